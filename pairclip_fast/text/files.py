"""The files of a text model in a folder: which kind it is, whether they are whole, and their digest.

Looked at before `transformers` is imported, so that a wrong or damaged folder is named at once, and so that a bank made
from the same files is recognised without loading the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.storage import sha256_file

CLIP_MODEL_TYPES = ("clip", "clip_text_model")
SAFE_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
OTHER_WEIGHTS = "pytorch_model.bin"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model", "sentencepiece.bpe.model", "spiece.model")
DIGESTED = (
    "config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    *TOKENIZER_FILES,
)
METHOD = "pairclip-fast text features 1"
"""Part of every digest: change it whenever the way from files to features changes."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelFiles:
    """A text model found on this machine."""

    kind: Literal["clip", "minilm", "sentence"]
    model: str
    """The model's public name: hub id, package, or name of its folder."""
    folder: Path

    def digest(self) -> str:
        """SHA-256 over the names and contents of all files that the features depend on."""
        digest = hashlib.sha256(METHOD.encode())
        weights = [path.name for path in self.folder.glob("*.safetensors")] or [OTHER_WEIGHTS]
        for name in sorted({*DIGESTED, *weights}):
            path = self.folder / name
            if path.is_file():
                digest.update(f"\n{name} {sha256_file(path)}".encode())
        return digest.hexdigest()


def read_model_json(path: Path) -> dict[str, Any]:
    """A JSON object among a model's files.

    Raises:
        EnvironmentLackingError: missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EnvironmentLackingError("cannot read a text model's file", where=path, got=error) from error
    if not isinstance(value, dict):
        raise EnvironmentLackingError("cannot read a text model's file", where=path, expected="a JSON object", got=type(value).__name__)
    return value


def missing_files(folder: Path) -> list[str]:
    """What a model folder lacks, in words; empty if everything needed is there."""
    weights = any((folder / name).is_file() for name in (*SAFE_WEIGHTS, OTHER_WEIGHTS))
    tokenizer = any((folder / name).is_file() for name in TOKENIZER_FILES)
    parts = ((folder / "config.json").is_file(), "config.json"), (weights, SAFE_WEIGHTS[0]), (tokenizer, "the tokenizer's files")
    return [name for present, name in parts if not present]


def open_folder(folder: Path, *, model: str) -> ModelFiles:
    """The model in `folder`, its kind taken from config.json.

    Raises:
        EnvironmentLackingError: files are missing, or it is no text encoder that we know how to use.
    """
    if missing := missing_files(folder):
        raise EnvironmentLackingError(
            "the folder of the text encoder is incomplete",
            where=folder,
            expected="config.json, model.safetensors and the tokenizer's files, as a Hugging Face repository has them",
            got=f"no {', no '.join(missing)}",
        )
    config = read_model_json(folder / "config.json")
    if config.get("model_type") in CLIP_MODEL_TYPES:
        return ModelFiles("clip", model, folder)
    if "vision_config" in config:
        raise EnvironmentLackingError(
            "unknown kind of text encoder",
            where=folder / "config.json",
            expected="model_type clip, or a sentence-transformers model",
            got=config.get("model_type"),
        )
    return ModelFiles("sentence", model, folder)
