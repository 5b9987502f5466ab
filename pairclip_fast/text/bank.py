"""The caption bank: every caption of a data set, embedded once, in the order of the caption ids.

Training and evaluation see captions only as rows of this matrix. `bank_for` is the way in: it reads the data folder's
`captions.safetensors`, or embeds the captions and writes it. A bank of a caption template has num_classes^2 rows and
knows which caption is another's left-right swap; a bank of free captions works everywhere else.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from pairclip_fast.data.manifest import Manifest
from pairclip_fast.data.options import check_template
from pairclip_fast.data.pairs import captions as captions_of
from pairclip_fast.errors import ConfigError, DataError
from pairclip_fast.events import EventLog
from pairclip_fast.storage import REAL, FileSystem
from pairclip_fast.text.bank_file import check_features, read_bank_file, text_list, write_bank_file
from pairclip_fast.text.choice import choose_encoder, why_embed_again
from pairclip_fast.text.encoders import DEFAULT_BATCH_SIZE, TextEncoder
from pairclip_fast.text.whiten import apply_map, name_means, whitening_map

BANK_NAME = "captions.safetensors"
REBUILD = "make it anew with `pairclip-fast embed --data DIR`"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class CaptionBank:
    """Text features of all captions, and what they were made from."""

    text_features: Float[Tensor, "n dim"]
    """float32, L2-normalised, on the CPU."""
    encoder: str
    """clip, minilm, sentence or hashed."""
    model: str
    """Which model of that kind."""
    digest: str
    """SHA-256 of the encoder (its files, or the version of the built-in code)."""
    features: str = "pooled"
    """CLIP: `projected` or `pooled`."""
    template: str = ""
    """Caption template with {left} and {right}; empty for free captions."""
    class_names: tuple[str, ...] = ()
    """Classes that the template was filled with; empty for free captions."""
    free_captions: tuple[str, ...] = ()
    """The captions themselves where they come from no template."""
    kind: Literal["raw", "whiten"] = "raw"
    mean: Float64[Tensor, " raw"] | None = None
    """Whitened banks: what was subtracted from the raw features."""
    projection: Float64[Tensor, "raw dim"] | None = None
    """Whitened banks: the linear map that was applied after it."""

    def __post_init__(self) -> None:
        if bool(self.free_captions) == bool(self.class_names):
            raise DataError("a caption bank has either class names and a template, or free captions", where="the caption bank", fix=REBUILD)
        check_features(self.text_features, count=len(self.captions), where="the caption bank", fix=REBUILD)

    @property
    def num_captions(self) -> int:
        """Rows of the bank."""
        return int(self.text_features.shape[0])

    @property
    def dim(self) -> int:
        """Width of the features."""
        return int(self.text_features.shape[1])

    @functools.cached_property
    def captions(self) -> tuple[str, ...]:
        """The captions in the order of their ids."""
        return self.free_captions or tuple(captions_of(self.class_names, self.template))

    @functools.cached_property
    def swap_ids(self) -> Int64[Tensor, " n"]:
        """Per caption, the id of the caption with left and right exchanged; of free captions, its own id."""
        ids = torch.arange(self.num_captions)
        if self.free_captions:
            return ids
        classes = len(self.class_names)
        return ids % classes * classes + ids // classes

    @functools.cached_property
    def groups(self) -> Int64[Tensor, " n"]:
        """Per caption, the smallest id of a caption with the same text or the same feature row.

        Captions of one group are positives of each other: no image could prefer one of them.
        """
        first_of_text: dict[str, int] = {}
        same_text = np.array([first_of_text.setdefault(text, row) for row, text in enumerate(self.captions)])
        rows = self.text_features.numpy() + np.float32(0.0)  # -0.0 becomes 0.0: equal numbers, equal bytes
        first_of_row: dict[bytes, int] = {}
        same_row = np.array([first_of_row.setdefault(rows[row].tobytes(), row) for row in range(len(rows))])
        _, first, inverse = np.unique(same_row[same_text], return_index=True, return_inverse=True)
        return torch.from_numpy(first[inverse].astype(np.int64))

    def whiten(self, rank: int, *, strength: float = 1.0, prompt_ensemble: bool = False) -> CaptionBank:
        """This bank centred, PCA-whitened to `rank` directions and L2-normalised: a fixed linear map (kept as fields).

        Args:
            rank: At most this many directions; fewer if the centred bank has fewer.
            strength: How far; see `whitening_map`.
            prompt_ensemble: Take the means of the names (`name_means`) for the captions' own features, in the map and under it.

        Raises:
            DataError: the captions cannot be told apart.
            ValueError: the bank is whitened already, the rank is not positive, or an ensemble of free captions is asked for.
        """
        if self.kind != "raw" or rank < 1 or (prompt_ensemble and self.free_captions):
            raise ValueError(f"cannot whiten a {self.kind} bank to rank {rank}" + " with an ensemble" * prompt_ensemble)
        rows = name_means(self.text_features, classes=len(self.class_names)) if prompt_ensemble else self.text_features
        mean, projection = whitening_map(rows, rank=rank, strength=strength)
        features = apply_map(rows, mean=mean, projection=projection)
        return dataclasses.replace(self, text_features=features, kind="whiten", mean=mean, projection=projection)

    def map_features(self, raw_features: Float[Tensor, "m raw"]) -> Float[Tensor, "m dim"]:
        """Features of further captions, from the same encoder, mapped as this bank's were."""
        if self.mean is None or self.projection is None:
            return torch.nn.functional.normalize(raw_features.float(), dim=-1)
        return apply_map(raw_features, mean=self.mean, projection=self.projection)

    def save(self, path: Path, *, fs: FileSystem = REAL) -> None:
        """Write the bank to one safetensors file, atomically."""
        tensors = {"text_features": self.text_features, "mean": self.mean, "projection": self.projection}
        texts = {name: getattr(self, name) for name in ("kind", "encoder", "model", "digest", "features", "template")}
        lists = {"class_names": json.dumps(self.class_names), "captions": json.dumps(self.free_captions)}
        write_bank_file(path, {name: tensor for name, tensor in tensors.items() if tensor is not None}, texts | lists, fs=fs)

    @classmethod
    def load(cls, path: Path, *, fix: str = REBUILD) -> CaptionBank:
        """Read and check a bank file.

        Args:
            path: The file.
            fix: What the user can do if it is bad.

        Raises:
            DataError: missing, damaged, or no caption bank.
        """
        tensors, metadata = read_bank_file(path, fix=fix)
        names = text_list(metadata["class_names"], where=path, name="class_names", fix=fix)
        free = text_list(metadata["captions"], where=path, name="captions", fix=fix)
        kind = metadata["kind"]
        wanted = {"raw": {"text_features"}, "whiten": {"text_features", "mean", "projection"}}
        if kind not in wanted or set(tensors) != wanted[kind]:
            raise DataError("this is not a caption bank", where=path, expected=wanted.get(kind, list(wanted)), got=sorted(tensors), fix=fix)
        check_features(tensors["text_features"], count=len(free) or len(names) ** 2, where=path, fix=fix)
        _check_map(tensors, where=path, fix=fix)
        try:
            if names:
                check_template(metadata["template"])
        except ConfigError as error:
            raise DataError("the caption bank's template is malformed", where=path, got=metadata["template"], fix=fix) from error
        return cls(
            text_features=tensors["text_features"],
            encoder=metadata["encoder"],
            model=metadata["model"],
            digest=metadata["digest"],
            features=metadata["features"],
            template=metadata["template"],
            class_names=names,
            free_captions=free,
            kind="raw" if kind == "raw" else "whiten",
            mean=tensors.get("mean"),
            projection=tensors.get("projection"),
        )


def embed_bank(
    encoder: TextEncoder,
    *,
    class_names: Sequence[str] = (),
    template: str = "",
    free_captions: Sequence[str] = (),
    batch_size: int = DEFAULT_BATCH_SIZE,
    events: EventLog,
) -> CaptionBank:
    """A raw bank of all captions of a template, or of `free_captions`.

    Args:
        encoder: A loaded text encoder.
        class_names: Classes to fill the template with; caption id = left * len(class_names) + right.
        template: Text with the fields {left} and {right}.
        free_captions: Instead of classes and template: the captions themselves.
        batch_size: Captions per forward pass.
        events: Shown the progress.
    """
    texts = list(free_captions) or captions_of(tuple(class_names), template)
    return CaptionBank(
        text_features=encoder.encode(texts, events=events, batch_size=batch_size),
        encoder=encoder.name,
        model=encoder.model,
        digest=encoder.digest,
        features=encoder.features,
        template=template,
        class_names=tuple(class_names),
        free_captions=tuple(free_captions),
    )


def bank_for(
    folder: Path,
    manifest: Manifest,
    *,
    text_encoder: str = "auto",
    batch_size: int = DEFAULT_BATCH_SIZE,
    projected: bool | None = None,
    rebuild: bool = False,
    events: EventLog,
) -> CaptionBank:
    """The raw bank of a data folder: its `captions.safetensors` if that fits, else embedded now and written there.

    With `auto` any whole bank of the right captions fits. An encoder asked for by name must have made it, as its digest
    says; otherwise the captions are embedded again, and that is said. Reusing a bank does not import transformers.

    Args:
        folder: The data folder.
        manifest: Its manifest (class names and template).
        text_encoder: auto, clip, minilm, hashed, a model folder, or a hub id.
        batch_size: Captions per forward pass.
        projected: CLIP: features after the projection or the pooled state before it; None: as the bank has them,
            projected if they are made now.
        rebuild: Replace a bank that is damaged or has other captions, instead of raising.
        events: Told what was done and why.

    Raises:
        DataError: the existing bank is damaged or of other captions (unless `rebuild`).
        EnvironmentLackingError: the encoder asked for is not available.
        StorageError: the bank cannot be written.
    """
    path = folder / BANK_NAME
    bank = _existing_bank(path, manifest, rebuild=rebuild, events=events)
    reason = None if bank is None else why_embed_again(text_encoder, bank, projected=projected, events=events)
    if bank is not None and reason is None:
        return bank
    encoder = choose_encoder(text_encoder, events=events, projected=projected is not False)
    if reason is not None:
        events.note(f"captions are embedded again: {reason}")
    events.note(f"embedding {manifest.num_captions:,} captions with {encoder.name} ({encoder.model})")
    bank = embed_bank(encoder, class_names=manifest.class_names, template=manifest.template, batch_size=batch_size, events=events)
    bank.save(path)
    return bank


def _existing_bank(path: Path, manifest: Manifest, *, rebuild: bool, events: EventLog) -> CaptionBank | None:
    """The whole, fitting bank at `path`, or None if there is none (or `rebuild` may replace a bad one)."""
    if not path.exists():
        return None
    fix = f"make it anew with `pairclip-fast embed --data {path.parent}`"
    try:
        bank = CaptionBank.load(path, fix=fix)
        for name, expected, got in (
            ("class names", tuple(manifest.class_names), bank.class_names),
            ("template", manifest.template, bank.template),
            ("kind", "raw", bank.kind),
        ):
            if expected != got:
                raise DataError(f"the caption bank was made for another {name}", where=path, expected=expected, got=got, fix=fix)
    except DataError as error:
        if not rebuild:
            raise
        events.note(f"{error.what}: it is replaced")
        return None
    return bank


def _check_map(tensors: dict[str, Tensor], *, where: Path, fix: str) -> None:
    """A whitening map must have the shapes of its bank and be finite."""
    if "mean" not in tensors:
        return
    mean, projection, dim = tensors["mean"], tensors["projection"], tensors["text_features"].shape[1]
    shapes = mean.ndim == 1 and tuple(projection.shape) == (mean.numel(), dim)
    if not (shapes and mean.dtype == projection.dtype == torch.float64 and bool(mean.isfinite().all() and projection.isfinite().all())):
        got = f"{mean.dtype} {tuple(mean.shape)}, {projection.dtype} {tuple(projection.shape)}"
        raise DataError(
            "the caption bank's whitening map is damaged", where=where, expected=f"finite float64 (raw,), (raw, {dim})", got=got, fix=fix
        )
