"""Which text encoder is used, and why: from the word on the command line to a loaded encoder.

`auto` takes CLIP ViT-B (folder, local cache, hub), else MiniLM from its package, else `hashed`, and says what it passed
over. An encoder asked for by name is used or the command fails at once: it is never replaced by another.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Protocol, runtime_checkable

from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.text import hub
from pairclip_fast.text.encoders import TextEncoder
from pairclip_fast.text.files import ModelFiles, missing_files, open_folder
from pairclip_fast.text.hashed import HashedEncoder
from pairclip_fast.text.sentence import MINILM_PACKAGE, find_minilm

CLIP_MODELS = ("openai/clip-vit-base-patch32", "openai/clip-vit-base-patch16")
CLIP_FOLDER_VARIABLE = "PAIRCLIP_CLIP_FOLDER"
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
WAYS_OUT = (
    "one of: (1) --text-encoder FOLDER with the files of a CLIP or sentence-transformers model; "
    f"(2) on a machine with a network `hf download {CLIP_MODELS[0]}`, then copy its cache here (HF_HOME); "
    f"(3) --text-encoder minilm after `pip install {MINILM_PACKAGE}`, or --text-encoder hashed, which is built in"
)


@runtime_checkable
@runtime_checkable
class MadeBy(Protocol):
    """What a caption bank knows of its encoder."""

    @property
    def encoder(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def digest(self) -> str: ...
    @property
    def features(self) -> str: ...


def choose_encoder(choice: str = "auto", *, events: EventLog, projected: bool = True, device: str = "auto") -> TextEncoder:
    """A loaded text encoder.

    Args:
        choice: auto, clip, minilm, hashed, a model folder, or a hub id.
        events: Told what `auto` passed over and why.
        projected: CLIP's features after its projection, or the pooled state before it.
        device: auto, cpu or cuda.

    Raises:
        EnvironmentLackingError: `choice` is not available here, or its files are damaged.
    """
    files = find_auto(events=events) if choice == "auto" else find_named(choice, events=events)
    if files is None:
        return HashedEncoder()
    return load_encoder(files, projected=projected, device=device)


def load_encoder(files: ModelFiles, *, projected: bool = True, device: str = "auto") -> TextEncoder:
    """Load the model in `files` (the step that imports transformers)."""
    from pairclip_fast.text.clip import load_clip
    from pairclip_fast.text.loading import text_device
    from pairclip_fast.text.sentence import load_sentence_encoder

    if files.kind == "clip":
        return load_clip(files, projected=projected, device=text_device(device))
    return load_sentence_encoder(files, device=text_device(device))


def find_auto(*, events: EventLog) -> ModelFiles | None:
    """The best encoder that this machine can have; None stands for `hashed`."""
    local = find_local_clip()
    if local is not None:
        return local
    reason = hub.why_unreachable()
    if reason is None:
        try:
            return open_folder(hub.download(CLIP_MODELS[0], events=events), model=CLIP_MODELS[0])
        except EnvironmentLackingError as error:
            reason = f"{error.what}: {error.got}"
    reason = f"no CLIP ViT-B in a folder or the local cache, and {reason}"
    minilm = find_minilm()
    if minilm is not None:
        events.fallback("text encoder", chosen="minilm", reason=reason)
        return minilm
    events.fallback("text encoder", chosen="hashed", reason=f"{reason}; the package {MINILM_PACKAGE} is not installed")
    return None


def find_named(choice: str, *, events: EventLog, fetch: bool = True) -> ModelFiles | None:
    """The encoder that the user asked for; None stands for `hashed`.

    Args:
        choice: clip, minilm, hashed, a folder, or a hub id.
        events: Told about downloads.
        fetch: Whether the hub may be asked.

    Raises:
        EnvironmentLackingError: not available here; lists the ways out.
    """
    if choice == "hashed":
        return None
    if choice == "minilm":
        found = find_minilm()
        if found is None:
            raise EnvironmentLackingError(f"the package {MINILM_PACKAGE} is not installed", where="--text-encoder minilm", fix=WAYS_OUT)
        return found
    if choice == "clip":
        return find_local_clip() or _from_hub(CLIP_MODELS[0], choice=choice, events=events, fetch=fetch)
    folder = Path(choice).expanduser()
    if folder.is_dir():
        return open_folder(folder, model=folder.resolve().name)
    if folder.is_absolute() or choice.startswith((".", "~")) or not HUB_ID.fullmatch(choice):
        raise EnvironmentLackingError(
            "there is no such text encoder", where="--text-encoder", expected="a folder", got=choice, fix=WAYS_OUT
        )
    cached = hub.cached_folder(choice)
    return open_folder(cached, model=choice) if cached else _from_hub(choice, choice=choice, events=events, fetch=fetch)


def why_embed_again(choice: str, made_by: MadeBy, *, projected: bool | None, events: EventLog) -> str | None:
    """Why features of `made_by` are not what `choice` would give; None if they are, as far as can be told here.

    Args:
        choice: The encoder asked for; `auto` accepts any.
        made_by: A bank (its kind of encoder, model, digest and feature kind).
        projected: Whether CLIP's projected features are wanted; None accepts either.
        events: Told if the encoder's files are not here to compare with.

    Raises:
        EnvironmentLackingError: the encoder asked for is another one and is not here.
    """
    made = f"{made_by.encoder} ({made_by.model})"
    if projected is not None and made_by.encoder == "clip" and (made_by.features == "projected") != projected:
        return f"the bank has {made_by.features} features"
    if choice == "auto":
        return None
    try:
        files = find_named(choice, events=events, fetch=False)
    except EnvironmentLackingError as error:
        if choice not in (made_by.encoder, made_by.model) and Path(choice).name != made_by.model:
            return f"the bank was made by {made}, asked for is {choice}"
        events.fallback("text encoder", chosen=f"the existing bank of {made}", reason=f"its files cannot be compared: {error.what}")
        return None
    kind, digest = ("hashed", HashedEncoder().digest) if files is None else (files.kind, files.digest())
    if kind != made_by.encoder:
        return f"the bank was made by {made}, asked for is {choice}"
    return None if digest == made_by.digest else f"the bank was made by {made} from other files than {choice} has now"


def find_local_clip() -> ModelFiles | None:
    """CLIP ViT-B in the usual local places: $PAIRCLIP_CLIP_FOLDER, a folder named as the hub's, the local cache."""
    if own := os.environ.get(CLIP_FOLDER_VARIABLE):
        return open_folder(Path(own), model=Path(own).resolve().name)
    for model in CLIP_MODELS:
        for folder in (Path(model), Path(model.split("/")[1])):
            if folder.is_dir() and not missing_files(folder):
                return open_folder(folder, model=model)
    for model in CLIP_MODELS:
        if folder_in_cache := hub.cached_folder(model):
            return open_folder(folder_in_cache, model=model)
    return None


def _from_hub(model: str, *, choice: str, events: EventLog, fetch: bool) -> ModelFiles:
    reason = hub.why_unreachable() if fetch else "the hub was not asked"
    if reason is not None:
        raise EnvironmentLackingError(f"the text encoder {model} is not here, and {reason}", where=f"--text-encoder {choice}", fix=WAYS_OUT)
    return open_folder(hub.download(model, events=events), model=model)
