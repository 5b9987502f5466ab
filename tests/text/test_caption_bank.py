"""The bank and its file: swaps, groups, round trips, damage, and when it is made anew."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast.errors import DataError, EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.text import bank as bank_module
from pairclip_fast.text import choice
from pairclip_fast.text.bank import BANK_NAME, CaptionBank, bank_for, embed_bank
from pairclip_fast.text.bank_file import write_bank_file
from pairclip_fast.text.hashed import HashedEncoder

from .conftest import CLASSES, TEMPLATE

QUIET = EventLog(console=False)


def hashed_bank(class_names: tuple[str, ...] = CLASSES, template: str = TEMPLATE) -> CaptionBank:
    return embed_bank(HashedEncoder(), class_names=class_names, template=template, events=QUIET)


@given(st.lists(st.text("abc {}", min_size=1, max_size=5), min_size=1, max_size=6, unique=True))
def test_ids_and_swaps(class_names: list[str]) -> None:
    bank = hashed_bank(tuple(class_names), "{left} and {right}")
    classes = len(class_names)
    assert bank.num_captions == classes**2
    for left in range(classes):
        for right in range(classes):
            row = left * classes + right
            assert bank.captions[row] == f"{class_names[left]} and {class_names[right]}"
            assert int(bank.swap_ids[row]) == right * classes + left
    assert torch.equal(bank.swap_ids[bank.swap_ids], torch.arange(classes**2))


def test_free_captions_have_no_swaps() -> None:
    bank = embed_bank(HashedEncoder(), free_captions=("a", "b", "c"), events=QUIET)
    assert torch.equal(bank.swap_ids, torch.arange(3))
    assert bank.captions == ("a", "b", "c")


def test_groups_join_equal_captions_and_equal_features() -> None:
    one_sided = hashed_bank(("a", "b", "c"), "only {left}")
    assert one_sided.groups.tolist() == [0, 0, 0, 3, 3, 3, 6, 6, 6]
    same_feature = embed_bank(HashedEncoder(), free_captions=("x", "Cat", "cat", "y", "CAT"), events=QUIET)
    assert same_feature.groups.tolist() == [0, 1, 1, 3, 1]
    assert hashed_bank().groups.tolist() == list(range(16))


def test_groups_join_equal_captions_with_unequal_features() -> None:
    rows = torch.eye(4)
    bank = CaptionBank(text_features=rows, encoder="e", model="m", digest="0", free_captions=("a", "b", "a", "c"))
    assert bank.groups.tolist() == [0, 1, 0, 3]


def test_negative_zero_is_zero() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, -0.0]])
    assert CaptionBank(text_features=rows, encoder="e", model="m", digest="0", free_captions=("a", "b")).groups.tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["raw", "whiten"])
@pytest.mark.parametrize("free", [False, True])
def test_round_trip(tmp_path: Path, kind: str, free: bool) -> None:
    captions = ("a b", "\u00fc", 'x "y" <script>\n\x1b[0m')
    bank = embed_bank(HashedEncoder(), free_captions=captions, events=QUIET) if free else hashed_bank()
    bank = bank.whiten(2) if kind == "whiten" else bank
    path = tmp_path / "b.safetensors"
    bank.save(path)
    again = CaptionBank.load(path)
    for field in dataclasses.fields(CaptionBank):
        old, new = getattr(bank, field.name), getattr(again, field.name)
        assert torch.equal(old, new) if isinstance(old, torch.Tensor) else old == new, field.name
    first = path.read_bytes()
    again.save(path)
    assert path.read_bytes() == first, "equal banks are equal files"
    header = json.loads(first[8 : 8 + int.from_bytes(first[:8], "little")])
    assert list(header) == sorted(header)
    assert list(header["__metadata__"]) == sorted(header["__metadata__"]), "not in the order of a randomised hash map"


def test_safetensors_alone_can_read_it(tmp_path: Path) -> None:
    """The contract of the data folder: text_features f32[N, D] with metadata, for any program."""
    import safetensors

    hashed_bank().save(tmp_path / "b.safetensors")
    with safetensors.safe_open(tmp_path / "b.safetensors", "pt") as file:
        metadata, features = file.metadata(), file.get_tensor("text_features")
    assert features.dtype == torch.float32
    assert features.shape == (16, 512)
    assert json.loads(metadata["class_names"]) == list(CLASSES)
    assert (metadata["encoder"], metadata["template"], metadata["features"]) == ("hashed", TEMPLATE, "pooled")
    assert metadata["digest"] == HashedEncoder().digest


@pytest.fixture(scope="module")
def whole() -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        hashed_bank().save(Path(folder) / "b.safetensors")
        return (Path(folder) / "b.safetensors").read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.9999])
def test_truncation_is_found(tmp_path: Path, whole: bytes, share: float) -> None:
    path = tmp_path / "b.safetensors"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(DataError, match=r"b\.safetensors") as caught:
        CaptionBank.load(path)
    assert "pairclip-fast embed" in str(caught.value)


@given(st.data())
def test_no_changed_byte_gets_through(tmp_path_factory: pytest.TempPathFactory, whole: bytes, data: st.DataObject) -> None:
    """Any flipped bit is a DataError, or left everything as it was (JSON white space)."""
    damaged = bytearray(whole)
    at = data.draw(st.one_of(st.integers(0, 2_000), st.integers(0, len(whole) - 1)))
    damaged[at] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path_factory.mktemp("flip") / "b.safetensors"
    path.write_bytes(damaged)
    try:
        bank = CaptionBank.load(path)
    except DataError:
        return
    header_end = 8 + int.from_bytes(whole[:8], "little")
    assert at < header_end, "a changed feature must not get through"
    assert torch.equal(bank.text_features, hashed_bank().text_features)


def broken(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    """A file with a correct digest of wrong contents: damage made before writing."""
    texts = {
        "kind": "raw",
        "encoder": "e",
        "model": "m",
        "digest": "0",
        "features": "pooled",
        "template": "{left}-{right}",
        "captions": "[]",
    }
    write_bank_file(path, tensors, {**texts, "class_names": '["a", "b"]', **metadata})


UNIT = torch.eye(4)
NOT_A_NUMBER = torch.where(torch.eye(4) > 0, torch.nan, 0.0)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"text_features": torch.eye(3)}, {}, "wrong shape"),
        ({"text_features": torch.ones(4)}, {}, "wrong shape"),
        ({"text_features": torch.zeros(4, 0)}, {}, "wrong shape"),
        ({"text_features": torch.eye(4, dtype=torch.float16)}, {}, "wrong shape"),
        ({"text_features": NOT_A_NUMBER}, {}, "not finite unit"),
        ({"text_features": torch.eye(4) * 1.01}, {}, "not finite unit"),
        ({"text_features": torch.zeros(4, 4)}, {}, "not finite unit"),
        ({"features": UNIT}, {}, "not a caption bank"),
        ({"text_features": UNIT, "mean": torch.zeros(4)}, {}, "not a caption bank"),
        ({"text_features": UNIT}, {"kind": "whiten"}, "not a caption bank"),
        ({"text_features": UNIT}, {"kind": "other"}, "not a caption bank"),
        ({"text_features": UNIT, "mean": torch.zeros(3), "projection": torch.zeros(3, 4)}, {"kind": "whiten"}, "whitening map"),
        (
            {"text_features": UNIT, "mean": torch.full((3,), torch.nan).double(), "projection": torch.zeros(3, 4).double()},
            {"kind": "whiten"},
            "whitening map",
        ),
        ({"text_features": UNIT}, {"class_names": "a, b"}, "not a list"),
        ({"text_features": UNIT}, {"class_names": "[1, 2]"}, "not a list"),
        ({"text_features": UNIT}, {"template": "{left.__class__}"}, "template is malformed"),
        ({"text_features": UNIT}, {"captions": '["a", "b", "c", "d"]'}, "either class names"),
    ],
)
def test_wrong_contents_are_named(tmp_path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str], message: str) -> None:
    path = tmp_path / "b.safetensors"
    broken(path, tensors, **metadata)
    with pytest.raises(DataError, match=message):
        CaptionBank.load(path)


def test_the_fixture_itself_is_sound(tmp_path: Path) -> None:
    """Control for the test above: with right contents the same file loads."""
    broken(tmp_path / "b.safetensors", {"text_features": UNIT})
    assert CaptionBank.load(tmp_path / "b.safetensors").captions == ("a-a", "a-b", "b-a", "b-b")


def test_a_bank_without_our_metadata_is_refused(tmp_path: Path) -> None:
    import safetensors.torch

    safetensors.torch.save_file({"text_features": UNIT}, tmp_path / "b.safetensors")
    with pytest.raises(DataError, match="lacks metadata"):
        CaptionBank.load(tmp_path / "b.safetensors")
    with pytest.raises(DataError, match="no caption bank"):
        CaptionBank.load(tmp_path / "missing.safetensors")


# --- bank_for -------------------------------------------------------------------------------------------------------


def manifest(class_names: tuple[str, ...] = CLASSES, template: str = TEMPLATE) -> Any:
    from pairclip_fast.data.manifest import Manifest

    made = Manifest.__new__(Manifest)
    vars(made).update(class_names=class_names, template=template)
    return made


@pytest.fixture
def no_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to load an encoder or transformers fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("an encoder was loaded")

    monkeypatch.setattr(bank_module, "choose_encoder", refuse)
    monkeypatch.setitem(sys.modules, "transformers", None)


def test_it_is_made_once_and_then_reused(tmp_path: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch, request: Any) -> None:
    bank = bank_for(tmp_path, manifest(), text_encoder="hashed", events=events)
    stamp = (tmp_path / BANK_NAME).stat().st_mtime_ns
    request.getfixturevalue("no_encoder")
    for encoder in ("hashed", "auto"):
        again = bank_for(tmp_path, manifest(), text_encoder=encoder, events=events)
        assert torch.equal(bank.text_features, again.text_features)
    assert (tmp_path / BANK_NAME).stat().st_mtime_ns == stamp


def test_another_encoder_makes_it_anew_and_says_so(tmp_path: Path, clip_folder: Path, events: EventLog, notes: list[str]) -> None:
    bank_for(tmp_path, manifest(), text_encoder="hashed", events=events)
    clip = bank_for(tmp_path, manifest(), text_encoder=str(clip_folder), events=events)
    assert clip.encoder == "clip"
    assert any("embedded again" in note and "hashed" in note for note in notes)
    pooled = bank_for(tmp_path, manifest(), text_encoder=str(clip_folder), projected=False, events=events)
    assert (clip.dim, pooled.dim) == (24, 32)
    assert any("projected features" in note for note in notes)
    assert bank_for(tmp_path, manifest(), events=events).features == "pooled", "without a wish the bank stays as it is"
    assert CaptionBank.load(tmp_path / BANK_NAME).features == "pooled"


@pytest.mark.usefixtures("no_encoder")
def test_a_bank_outlives_its_encoder(tmp_path: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made elsewhere by MiniLM, which is not installed here: used, and said. Asked for another one: refused."""
    monkeypatch.setattr(choice, "find_minilm", lambda: None)
    dataclasses.replace(hashed_bank(), encoder="minilm", model="x", digest="1").save(tmp_path / BANK_NAME)
    assert bank_for(tmp_path, manifest(), text_encoder="minilm", events=events).encoder == "minilm"
    assert "existing bank" in events.fallbacks[0]["chosen"]
    with pytest.raises(AssertionError, match="encoder was loaded"):
        bank_for(tmp_path, manifest(), text_encoder="nobody/nothing", events=events)


def test_changed_model_files_make_it_anew(tmp_path: Path, clip_folder: Path, events: EventLog, notes: list[str]) -> None:
    bank_for(tmp_path, manifest(), text_encoder=str(clip_folder), events=events)
    stored = CaptionBank.load(tmp_path / BANK_NAME)
    dataclasses.replace(stored, digest="of other weights").save(tmp_path / BANK_NAME)
    again = bank_for(tmp_path, manifest(), text_encoder=str(clip_folder), events=events)
    assert again.digest == stored.digest
    assert any("other files" in note for note in notes)


@pytest.mark.parametrize(
    ("class_names", "template", "message"),
    [((*CLASSES[:3], "oak"), TEMPLATE, "class names"), (CLASSES, "{left} / {right}", "template")],
)
def test_a_bank_of_other_captions_is_refused_or_replaced(
    tmp_path: Path, events: EventLog, class_names: tuple[str, ...], template: str, message: str
) -> None:
    hashed_bank().save(tmp_path / BANK_NAME)
    other = manifest(class_names, template)
    with pytest.raises(DataError, match=message) as caught:
        bank_for(tmp_path, other, text_encoder="hashed", events=events)
    assert f"pairclip-fast embed --data {tmp_path}" in str(caught.value)
    replaced = bank_for(tmp_path, other, text_encoder="hashed", rebuild=True, events=events)
    assert (replaced.class_names, replaced.template) == (class_names, template)
    assert bank_for(tmp_path, other, events=events).template == template


def test_a_whitened_bank_is_not_the_data_folders_bank(tmp_path: Path, events: EventLog) -> None:
    hashed_bank().whiten(3).save(tmp_path / BANK_NAME)
    with pytest.raises(DataError, match="another kind"):
        bank_for(tmp_path, manifest(), events=events)


def test_an_unavailable_encoder_leaves_nothing_behind(tmp_path: Path, events: EventLog) -> None:
    with pytest.raises(EnvironmentLackingError):
        bank_for(tmp_path, manifest(), text_encoder="nobody/nothing", events=events)
    assert list(tmp_path.iterdir()) == []


def test_embedding_is_stopped_half_way(tmp_path: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while embedding: the old bank is still there, whole."""
    bank_for(tmp_path, manifest(), text_encoder="hashed", events=events)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    fake = SimpleNamespace(name="x", model="x", digest="x", features="pooled", dim=4, encode=stop)
    monkeypatch.setattr(bank_module, "choose_encoder", lambda *_, **__: fake)
    monkeypatch.setattr(bank_module, "why_embed_again", lambda *_, **__: "the test says so")
    with pytest.raises(KeyboardInterrupt):
        bank_for(tmp_path, manifest(), text_encoder="minilm", events=events)
    assert CaptionBank.load(tmp_path / BANK_NAME).encoder == "hashed"
    assert len(list(tmp_path.iterdir())) == 1
