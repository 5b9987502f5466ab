"""The inspector's figures against brute force, and the loss floor against what is known about it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.errors import ConfigError, DataError
from pairclip_fast.events import EventLog
from pairclip_fast.text.bank import CaptionBank, embed_bank
from pairclip_fast.text.commands import render_embed, run_embed
from pairclip_fast.text.floor import loss_floor
from pairclip_fast.text.hashed import HashedEncoder
from pairclip_fast.text.inspect import additive_share, inspect_bank, inspection_lines, mean_cosine, nearest_cosine, swap_cosine
from pairclip_fast.text.options import EmbedOptions

from .conftest import CLASSES, TEMPLATE

QUIET = EventLog(console=False)


def units(n: int, dim: int, seed: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + 0.7, dim=-1)


@given(st.integers(2, 40), st.integers(2, 9), st.integers(0, 99))
def test_cosines_are_those_of_all_pairs(n: int, dim: int, seed: int) -> None:
    features = units(n, dim, seed)
    cosines = features.double() @ features.double().T
    off = ~torch.eye(n, dtype=torch.bool)
    assert mean_cosine(features) == pytest.approx(float(cosines[off].mean()), abs=1e-6)
    assert nearest_cosine(features) == pytest.approx(float(cosines.masked_fill(~off, -2).amax(1).mean()), abs=1e-6)


def test_chunks_do_not_hide_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    features = units(50, 5, 1)
    whole = nearest_cosine(features)
    monkeypatch.setattr("pairclip_fast.text.inspect.CHUNK_ROWS", 7)
    assert nearest_cosine(features) == pytest.approx(whole, abs=1e-7)


def test_swap_cosine_leaves_out_captions_that_are_their_own_swap() -> None:
    features = torch.eye(4)  # (0,0), (0,1), (1,0), (1,1): the two mixed ones are orthogonal
    bank = CaptionBank(text_features=features, encoder="e", model="m", digest="0", template="{left}{right}", class_names=("a", "b"))
    assert swap_cosine(bank) == 0.0
    free = CaptionBank(text_features=features, encoder="e", model="m", digest="0", free_captions=tuple("abcd"))
    assert swap_cosine(free) is None


def floor_of_orthonormal(n: int, scale: float) -> float:
    """Closed form: by symmetry the best z is the centred own row, normalised: logits a for it, b for the others."""
    a, b = math.sqrt((n - 1) / n), -1 / math.sqrt(n * (n - 1))
    return math.log(math.exp(scale * (a - a)) + (n - 1) * math.exp(scale * (b - a)))


@pytest.mark.parametrize("n", [2, 5, 40])
@pytest.mark.parametrize("scale", [1.0, 14.3, 100.0])
def test_the_floor_of_orthonormal_captions_has_a_closed_form(n: int, scale: float) -> None:
    found = loss_floor(torch.eye(n), sample=torch.arange(n), scale=scale)
    exact = floor_of_orthonormal(n, scale)
    assert found.loss - found.gap - 1e-4 <= exact <= found.loss + 1e-4
    assert found.gap < 0.02
    assert found.top1 == 1.0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_search_beats_the_certificate(seed: int, smoothing: float) -> None:
    """Adam from several starts, in float64, on the loss as torch defines it, finds nothing below floor - gap."""
    bank, scale = units(30, 6, seed), 14.3
    sample = torch.arange(0, 30, 5)
    found = loss_floor(bank, sample=sample, scale=scale, label_smoothing=smoothing)
    best = torch.full((len(sample),), math.inf, dtype=torch.float64)
    for start in range(2):
        z = torch.randn(len(sample), 6, dtype=torch.float64, generator=torch.Generator().manual_seed(start)).requires_grad_()
        optimizer = torch.optim.Adam([z], lr=0.05)
        for _ in range(300):
            logits = scale * torch.nn.functional.normalize(z, dim=-1) @ bank.double().T
            losses = torch.nn.functional.cross_entropy(logits, sample, label_smoothing=smoothing, reduction="none")
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
        best = torch.minimum(best, losses.detach())
    assert found.loss - found.gap - 1e-5 <= float(best.mean()), "the certificate holds"
    assert found.loss <= float(best.mean()) + (0.15 if smoothing else 0.01), "and the search was good"


def test_the_caption_itself_is_not_the_best_image_feature() -> None:
    """Control: in a narrow cone z = own text feature is far above the floor, so the search is worth having."""
    bank = torch.nn.functional.normalize(units(60, 12, 3) + 2.0, dim=-1)
    naive = torch.nn.functional.cross_entropy(14.3 * bank @ bank.T, torch.arange(60))
    assert loss_floor(bank, sample=torch.arange(60), scale=14.3).loss < float(naive) - 0.5


def test_whitening_lowers_the_floor_and_duplicates_do_not_count() -> None:
    bank = embed_bank(HashedEncoder(), class_names=tuple("abcdefgh"), template=TEMPLATE, events=QUIET)
    raw, white = inspect_bank(bank, temperature=0.07), inspect_bank(bank.whiten(14), temperature=0.07)
    assert white["loss_floor"] < raw["loss_floor"] < raw["uniform_loss"]
    assert (raw["rank"], raw["dim"], white["dim"]) == (15, 512, 14), "7 left + 7 right, and the norms bend the flat once"
    doubled = embed_bank(HashedEncoder(), class_names=("a", "b"), template="{left}", events=QUIET)
    inspection = inspect_bank(doubled, temperature=0.07)
    assert (inspection["num_captions"], inspection["num_groups"]) == (4, 2)
    assert inspection["loss_floor"] < 0.01
    assert inspection["nearest_cosine"] == pytest.approx(1.0)


@given(st.integers(2, 9), st.integers(2, 6), st.floats(0, 2), st.integers(0, 99))
def test_the_additive_share_is_what_least_squares_explains(classes: int, dim: int, mixing: float, seed: int) -> None:
    """Oracle: regress the features on indicators of the left and the right class."""
    generator = torch.Generator().manual_seed(seed)
    left, right = torch.randn(2, classes, dim, generator=generator)
    cells = left[:, None] + right[None] + mixing * torch.randn(classes, classes, dim, generator=generator)
    features = torch.nn.functional.normalize(cells.reshape(-1, dim) + 3.0, dim=-1)
    names = tuple(f"c{i}" for i in range(classes))
    bank = CaptionBank(text_features=features, encoder="test", model="test", digest="0", template=TEMPLATE, class_names=names)
    rows = torch.arange(classes**2)
    design = torch.cat([torch.eye(classes)[rows // classes], torch.eye(classes)[rows % classes]], dim=1).double()
    centred = features.double() - features.double().mean(0)
    explained = design @ torch.linalg.pinv(design) @ centred
    assert additive_share(bank) == pytest.approx(float(explained.square().sum() / centred.square().sum()), abs=1e-6)


def test_free_captions_have_no_additive_share() -> None:
    bank = CaptionBank(text_features=units(4, 3, 0), encoder="test", model="test", digest="0", free_captions=tuple("abcd"))
    assert additive_share(bank) is None
    assert "additive share         -" in "\n".join(inspection_lines(inspect_bank(bank, temperature=0.07)))


def test_every_figure_has_a_line_of_words() -> None:
    bank = embed_bank(HashedEncoder(), class_names=CLASSES, template=TEMPLATE, events=QUIET)
    inspection = inspect_bank(bank, temperature=0.05, label_smoothing=0.1)
    json.dumps(inspection, allow_nan=False)
    text = "\n".join(inspection_lines(inspection))
    for word in (
        "mean cosine",
        "swap cosine",
        "nearest cosine",
        "rank",
        "additive share",
        "loss floor",
        "temperature 0.05",
        "label smoothing 0.1",
        "estimate",
    ):
        assert word in text
    assert text.isascii()


# --- pairclip-fast embed --------------------------------------------------------------------------------------------


def data_folder(folder: Path, class_names: tuple[str, ...] = CLASSES) -> Path:
    """A data folder that has a manifest and no shards: all that embedding looks at."""
    from pairclip_fast.data.manifest import Manifest, ShardEntry, SplitManifest, SplitProof, write_manifest

    shard = ShardEntry(name="000000.tar", count=1, bytes=1, sha256="0" * 64, index_bytes=1, index_sha256="0" * 64)
    split = SplitManifest(count=1, images=1, used_images=1, ids_sha256="0" * 64, contents_sha256="0" * 64, shards=(shard,))
    manifest = Manifest(
        format=1,
        source="shapes",
        description="made by a test",
        class_names=class_names,
        template=TEMPLATE,
        seed=0,
        encoding="raw",
        tiles=2,
        tile_height=32,
        tile_width=32,
        mean=(1.0, 1.0, 1.0),
        std=(1.0, 1.0, 1.0),
        splits={"train": split},
        split_proof=SplitProof(shared_ids=0, shared_contents_train_val=0, duplicate_images=0, test_contents_in_train=0),
        arguments={},
    )
    folder.mkdir(exist_ok=True)
    write_manifest(folder, manifest)
    return folder


def test_embed_writes_inspects_and_reuses(tmp_path: Path, events: EventLog) -> None:
    folder = data_folder(tmp_path / "data")
    options = EmbedOptions(data=folder, text_encoder="hashed")
    first, second = run_embed(options, events=events), run_embed(options, events=events)
    assert json.loads(json.dumps(first, allow_nan=False))["encoder"] == "hashed"
    assert (first["reused"], second["reused"]) == (False, True)
    assert set(first["inspections"]) == {"raw", "whiten"}
    assert "reused" in render_embed(second).splitlines()[0]
    assert "loss floor" in render_embed(first)


def test_embed_replaces_what_train_refuses(tmp_path: Path, events: EventLog, notes: list[str]) -> None:
    folder = data_folder(tmp_path / "data")
    (folder / "captions.safetensors").write_bytes(b"damaged")
    assert run_embed(EmbedOptions(data=folder, text_encoder="hashed"), events=events)["reused"] is False
    assert any("replaced" in note for note in notes)
    data_folder(folder, ("a", "b"))
    summary = run_embed(EmbedOptions(data=folder, text_encoder="hashed"), events=events)
    assert summary["inspections"]["raw"]["num_captions"] == 4


def test_embed_needs_a_data_folder(tmp_path: Path, events: EventLog) -> None:
    with pytest.raises(DataError, match="pairclip-fast shard"):
        run_embed(EmbedOptions(data=tmp_path), events=events)


def test_options_are_checked() -> None:
    with pytest.raises(ConfigError, match="--batch-size"):
        EmbedOptions(batch_size=0)
