"""A tiny CLIP in the real file format, banks of a few classes, and an event log that is silent."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pairclip_fast.events import EventLog

TEMPLATE = "the photo on the left is {left} and the photo on the right is {right}"
CLASSES = ("cat", "kitten", "rocket", "oak tree")
WORDS = ("the", "photo", "on", "left", "is", "and", "right", "cat", "rocket", "tree")


def pytest_configure(config: pytest.Config) -> None:
    """transformers and its compiled dependencies warn about themselves when first imported."""
    config.addinivalue_line("filterwarnings", "ignore:builtin type .* has no __module__ attribute:DeprecationWarning")


@pytest.fixture
def events() -> EventLog:
    return EventLog(console=False)


@pytest.fixture
def notes(events: EventLog) -> list[str]:
    """Messages of the notes that `events` was given, as they come."""
    said: list[str] = []
    events.subscribe(lambda event: said.append(event["message"]) if event["event"] == "note" else None)
    return said


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins for bytes of byte-level BPE (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("\xa1"), ord("\xac") + 1), *range(ord("\xae"), ord("\xff") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def write_tokenizer(folder: Path) -> int:
    """vocab.json and merges.txt as openai/clip-vit-base-patch32 has them, for a few words; returns the vocabulary size."""
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pair = (symbols[0], symbols[1])
            if pair not in merges:
                merges.append(pair)
            symbols = [pair[0] + pair[1], *symbols[2:]]
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *dict.fromkeys(a + b for a, b in merges), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}))
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    return len(tokens)


def write_clip(folder: Path, *, kind: str = "CLIPTextModelWithProjection") -> Path:
    """A randomly initialised CLIP (text tower, or whole) with 2 layers of width 32, projected to 24."""
    import transformers

    folder.mkdir(parents=True)
    size = write_tokenizer(folder)
    text = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 77,
        "projection_dim": 24,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "pad_token_id": size - 1,
        "initializer_factor": 20.0,
    }
    torch.manual_seed(1)
    if kind == "CLIPModel":
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 32,
            "patch_size": 16,
        }
        config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    else:
        config = transformers.CLIPTextConfig(**text)
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny-clip")
