"""CLIP's text tower from files in the published format, against transformers used one caption at a time."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.text.choice import choose_encoder

from .conftest import CLASSES, TEMPLATE, write_clip

CAPTIONS = [TEMPLATE.format(left=a, right=b) for a in CLASSES for b in CLASSES] + ["cat", "", "the photo"]


def one_by_one(folder: Path, captions: list[str], attribute: str) -> Tensor:
    """The oracle: no padding, no sorting, no batching."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    model: Any = (CLIPTextModelWithProjection if attribute == "text_embeds" else CLIPTextModel).from_pretrained(folder).eval()
    with torch.inference_mode():
        rows = [getattr(model(**tokenizer(text, return_tensors="pt")), attribute)[0] for text in captions]
    return torch.nn.functional.normalize(torch.stack(rows), dim=-1).clone()


@pytest.mark.parametrize(("projected", "attribute", "dim"), [(True, "text_embeds", 24), (False, "pooler_output", 32)])
def test_features_are_those_of_transformers(clip_folder: Path, events: EventLog, projected: bool, attribute: str, dim: int) -> None:
    encoder = choose_encoder(str(clip_folder), events=events, projected=projected, device="cpu")
    features = encoder.encode(CAPTIONS, events=events)
    assert (encoder.name, encoder.model, encoder.dim) == ("clip", "tiny-clip", dim)
    assert encoder.features == ("projected" if projected else "pooled")
    assert features.shape == (len(CAPTIONS), dim)
    assert features.dtype == torch.float32
    assert torch.allclose(features, one_by_one(clip_folder, CAPTIONS, attribute), atol=2e-6)
    assert torch.allclose(features.norm(dim=1), torch.ones(len(CAPTIONS)), atol=1e-6)


def test_the_oracle_tells_wrong_pooling_apart(clip_folder: Path, events: EventLog) -> None:
    """Control: the state of the last position of a padded batch, and the unprojected state, are not the feature."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    encoder = choose_encoder(str(clip_folder), events=events, device="cpu")
    right = encoder.encode(CAPTIONS, events=events)
    model, tokenizer = CLIPTextModelWithProjection.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    with torch.inference_mode():
        output = model(**tokenizer(CAPTIONS, return_tensors="pt", padding=True))
        wrong = torch.nn.functional.normalize(model.text_projection(output.last_hidden_state[:, -1]), dim=-1)
    assert (right - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("batch_size", [1, 3, 1_000])
def test_the_batch_size_does_not_matter(clip_folder: Path, events: EventLog, batch_size: int) -> None:
    encoder = choose_encoder(str(clip_folder), events=events, device="cpu")
    assert torch.allclose(
        encoder.encode(CAPTIONS, events=events, batch_size=batch_size), encoder.encode(CAPTIONS, events=events), atol=2e-6
    )


def test_twice_is_bit_equal_and_equal_tokens_are_equal_rows(clip_folder: Path, events: EventLog) -> None:
    encoder = choose_encoder(str(clip_folder), events=events, device="cpu")
    captions = ["the photo", "cat", "The  Photo", "rocket", "cat"]
    first, again = encoder.encode(captions, events=events, batch_size=2), encoder.encode(captions, events=events, batch_size=2)
    assert torch.equal(first, again)
    assert torch.equal(first[0], first[2])
    assert torch.equal(first[1], first[4])
    assert not torch.equal(first[0], first[1])


def test_a_whole_clip_gives_its_text_tower(tmp_path: Path, events: EventLog) -> None:
    folder = write_clip(tmp_path / "whole", kind="CLIPModel")
    features = choose_encoder(str(folder), events=events, device="cpu").encode(CAPTIONS, events=events)
    assert torch.allclose(features, one_by_one(folder, CAPTIONS, "text_embeds"), atol=2e-6)


def test_a_tower_without_projection_is_never_given_a_random_one(tmp_path: Path, events: EventLog) -> None:
    folder = write_clip(tmp_path / "bare", kind="CLIPTextModel")
    with pytest.raises(EnvironmentLackingError, match=r"text_projection"):
        choose_encoder(str(folder), events=events, device="cpu")
    assert choose_encoder(str(folder), events=events, projected=False, device="cpu").dim == 32


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_weights_are_named(clip_folder: Path, tmp_path: Path, events: EventLog, share: float) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])
    with pytest.raises(EnvironmentLackingError, match="cut") as caught:
        choose_encoder(str(folder), events=events, device="cpu")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("name", ["vocab.json", "config.json"])
def test_other_damage_is_named(clip_folder: Path, tmp_path: Path, events: EventLog, name: str) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "bad")
    (folder / name).write_text("{")
    with pytest.raises(EnvironmentLackingError, match="bad"):
        choose_encoder(str(folder), events=events, device="cpu")


def test_weights_that_are_not_finite_are_refused(clip_folder: Path, tmp_path: Path, events: EventLog) -> None:
    import safetensors.torch

    folder = shutil.copytree(clip_folder, tmp_path / "nan")
    tensors = safetensors.torch.load((folder / "model.safetensors").read_bytes())
    tensors["text_projection.weight"][0, 0] = torch.nan
    (folder / "model.safetensors").write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    with pytest.raises(EnvironmentLackingError, match="finite"):
        choose_encoder(str(folder), events=events, device="cpu").encode(["cat"], events=events)


def test_the_digest_follows_the_files_not_their_place(clip_folder: Path, tmp_path: Path, events: EventLog) -> None:
    from pairclip_fast.text.files import open_folder

    folder = shutil.copytree(clip_folder, tmp_path / "elsewhere")
    original = open_folder(clip_folder, model="a").digest()
    assert open_folder(folder, model="b").digest() == original
    with (folder / "merges.txt").open("a") as file:
        file.write("c a\n")
    changed_tokenizer = open_folder(folder, model="b").digest()
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    assert len({original, changed_tokenizer, open_folder(folder, model="b").digest()}) == 3


def test_long_captions_are_cut_and_said(clip_folder: Path, events: EventLog, notes: list[str]) -> None:
    encoder = choose_encoder(str(clip_folder), events=events, device="cpu")
    features = encoder.encode(["cat " * 200, "cat"], events=events)
    assert bool(features.isfinite().all())
    assert any("1 of 2 captions reach the text encoder's 77 tokens" in note for note in notes)
