"""Records that change on disk: found by every backend, and treated as the policy says."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from every_backend import CPU, FULL, MEAN, STD, make_named_loader
from picture_files import chunk, filtered, interlaced_png, made_png, pictures_of, saved, sixteen_bit_png
from PIL import Image

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data import writer
from pairclip_fast.data.bad_records import BadRecords
from pairclip_fast.data.loader import Batch, Loader
from pairclip_fast.data.shards import BadRecordError, ShardReader
from pairclip_fast.errors import DataError
from pairclip_fast.events import Event, EventLog
from pairclip_fast.native import native

BAD = 17
Damage = Callable[..., Path]


@pytest.fixture
def damaged(make_folder: Callable[..., Path], pixels: np.ndarray) -> Damage:
    """A folder of 30 samples in three shards, in some of whose records a bit was flipped."""

    def make(*bad: int, encoding: str = "raw") -> Path:
        folder = make_folder(pixels[:30], encoding=encoding, shard_size=12)
        with ShardReader(folder, "train") as reader:
            places = [(reader.shard_paths[sample // 12], int(reader.records.offsets[sample])) for sample in bad]
        for path, offset in places:
            data = bytearray(path.read_bytes())
            data[offset + 1000] ^= 4
            path.write_bytes(data)
        return folder

    return make


@pytest.fixture
def told(events: EventLog) -> list[Event]:
    seen: list[Event] = []
    events.subscribe(seen.append)
    return seen


def open_loader(folder: Path, backend: str, events: EventLog, **options: Any) -> Loader:
    settings = {"split": "train", "batch_size": 7, "augment": FULL, "seed": 5, "device": CPU, "drop_last": False, **options}
    return make_named_loader(folder, backend=backend, events=events, **settings)


def rows_by_id(loader: Loader) -> dict[int, tuple[torch.Tensor, int, bool]]:
    """One epoch: sample id -> picture, caption and validity; padding left out."""
    rows: dict[int, tuple[torch.Tensor, int, bool]] = {}
    left = 30
    for batch in loader:
        for row in range(min(7, left)):
            rows[int(batch.sample_ids[row])] = (batch.images[row], int(batch.caption_ids[row]), bool(batch.valid[row]))
        left -= 7
    assert sorted(rows) == list(range(30))
    return rows


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
def test_a_flipped_bit_is_found_and_named(encoding: str, backend: str, damaged: Damage, events: EventLog) -> None:
    loader = open_loader(damaged(BAD, encoding=encoding), backend, events)
    with pytest.raises(BadRecordError, match="have changed") as caught:
        list(loader)
    loader.close()
    assert caught.value.sample_id == BAD
    assert str(caught.value.where).endswith("000001.tar: 000000017")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_skipping_keeps_the_shape_of_the_batch(encoding: str, backend: str, damaged: Damage, events: EventLog, told: list[Event]) -> None:
    good = rows_by_id(open_loader(damaged(encoding=encoding), backend, events))
    loader = open_loader(damaged(BAD, encoding=encoding), backend, events, on_bad_record="skip")
    for _ in range(2):
        epoch, rows = loader.state_dict()["epoch"], rows_by_id(loader)
        picture, _, valid = rows.pop(BAD)
        assert not valid
        assert not picture.any()
        assert all(valid for _, _, valid in rows.values())
        assert epoch != 0 or all(torch.equal(rows[i][0], good[i][0]) for i in rows)
    (event,) = (event for event in told if event["event"] == "bad_record")
    assert (event["key"], event["policy"], Path(event["shard"]).name) == ("000000017", "skip", "000001.tar")
    assert event["offset"] > 0
    assert "changed" in event["reason"]
    assert loader.stats.bad_records == 1
    loader.close()


def test_substitution_takes_pixels_and_caption_of_the_next_good_sample(backend: str, damaged: Damage, events: EventLog) -> None:
    plain = rows_by_id(open_loader(damaged(), backend, events, augment=None))
    for batch_size in (7, 30):
        loader = open_loader(damaged(29), backend, events, augment=None, on_bad_record="substitute", batch_size=batch_size)
        for batch in loader:
            assert int(batch.valid.sum()) == min(batch_size, 30 - batch.step * batch_size)
            for row, sample_id in enumerate(batch.sample_ids.tolist()):
                picture, caption, _ = plain[0 if sample_id == 29 else sample_id]  # after the last comes the first
                assert torch.equal(batch.images[row], picture)
                assert int(batch.caption_ids[row]) == caption
        loader.close()


def test_a_mixture_with_a_bad_partner_is_skipped_too(backend: str, damaged: Damage, events: EventLog) -> None:
    augment = AugmentConfig(mix="mixup", mix_probability=1.0)
    good = rows_by_id(open_loader(damaged(), backend, events, augment=augment))
    rows = rows_by_id(open_loader(damaged(BAD), backend, events, augment=augment, on_bad_record="skip"))
    skipped = [sample_id for sample_id, (_, _, valid) in rows.items() if not valid]
    assert BAD in skipped
    assert len(skipped) == 2
    for sample_id, (picture, _, valid) in rows.items():
        assert torch.equal(picture, good[sample_id][0]) if valid else not picture.any()


def test_backends_agree_on_what_is_left(damaged: Damage, events: EventLog) -> None:
    folder = damaged(BAD)
    for policy in ("skip", "substitute"):
        streams = [list(open_loader(folder, name, events, on_bad_record=policy)) for name in ("native", "twin", "reference")]
        for batches in zip(*streams, strict=True):
            first: Batch = batches[0]
            for other in batches[1:]:
                assert torch.equal(first.valid, other.valid)
                assert torch.equal(first.caption_ids, other.caption_ids)
                assert ((first.images - other.images).abs() * STD).max() < 0.02


@pytest.mark.parametrize("policy", ["skip", "substitute"])
def test_too_many_bad_records_stop_under_every_policy(policy: str, backend: str, damaged: Damage, events: EventLog) -> None:
    loader = open_loader(damaged(3, BAD), backend, events, on_bad_record=policy)
    with pytest.raises(DataError, match="too many bad records") as caught:
        list(loader)
    loader.close()
    assert caught.value.got == "2" or caught.value.got == 2


def test_a_resumed_loader_knows_its_bad_records(damaged: Damage, events: EventLog, told: list[Event]) -> None:
    folder = damaged(BAD)
    first = open_loader(folder, "native", events, on_bad_record="skip")
    whole = list(first)
    first.set_epoch(0)
    iterator = iter(first)
    for _ in range(5):
        next(iterator)
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    assert state["bad"] == "17"
    told.clear()
    second = open_loader(folder, "native", events, on_bad_record="skip")
    second.load_state_dict({**state, "epoch": 0, "cursor": 0})
    for before, after in zip(whole, second, strict=True):
        assert torch.equal(before.valid, after.valid)
        assert torch.equal(before.images, after.images)
    assert [event for event in told if event["event"] == "bad_record"] == []
    assert second.stats.bad_records == 1
    for nonsense in ("x", "-1", "30", "1 2 y"):
        with pytest.raises(DataError, match="damaged"):
            second.load_state_dict({**state, "bad": nonsense})
    second.close()


PICTURE = pictures_of(1)[0]
ALPHA = np.dstack([PICTURE, PICTURE[..., :1]])
STRANGE = {
    "palette": ("png", saved(PICTURE[..., 0], "PNG", bits=4)),
    "grey": ("png", saved(PICTURE[..., 0], "PNG")),
    "alpha": ("png", saved(ALPHA, "PNG")),
    "other size": ("png", saved(PICTURE[:, :63], "PNG")),
    "grey JPEG": ("jpeg", saved(PICTURE[..., 0], "JPEG")),
    "CMYK": ("jpeg", saved(ALPHA, "JPEG", mode="CMYK")),
    "JPEG of other size": ("jpeg", saved(PICTURE[:31], "JPEG")),
}
"""Pictures that are no RGB of the right size, which only their headers say."""
TURNED = Image.Exif()
TURNED[0x0112] = 3
UNUSUAL = {
    "interlaced": ("png", interlaced_png(PICTURE), 0.01),
    "16 bits": ("png", sixteen_bit_png(PICTURE), 1.01),  # DALI rounds the low byte, Pillow drops it
    "transparent colour": ("png", made_png(filtered(PICTURE, [1] * 32), extra=chunk(b"tRNS", bytes(6))), 0.01),
    "progressive": ("jpeg", saved(PICTURE, "JPEG", quality=95, progressive=True), 1.5),
    "orientation": ("jpeg", saved(PICTURE, "JPEG", quality=95, exif=TURNED), 1.5),
}
"""Pictures that `shard` does not write, but whose pixels are not in doubt; with a tolerance in units of 0..255."""


def with_record(make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, *, encoding: str, record: bytes) -> Path:
    """Nine samples, the fourth of which is `record`; index and checksums say so too."""
    plain = writer.encode_tiles
    pixels = np.random.default_rng(0).integers(0, 200, (9, 2, 32, 32, 3), dtype=np.uint8)
    pixels[4, 0, 0, 0] = 255
    monkeypatch.setattr(writer, "encode_tiles", lambda tiles, kind: record if tiles[0, 0, 0, 0] == 255 else plain(tiles, kind))
    return make_folder(pixels, encoding=encoding)


def of_one_batch(folder: Path, backend: str, events: EventLog) -> tuple[Batch, int]:
    """All nine samples, and the row of the fourth."""
    loader = open_loader(folder, backend, events, batch_size=9, augment=None, on_bad_record="skip")
    (batch,) = loader
    loader.close()
    return batch, batch.sample_ids.tolist().index(4)


@pytest.mark.parametrize("kind", STRANGE)
def test_pictures_of_another_kind_are_bad_records(
    kind: str, backend: str, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, events: EventLog
) -> None:
    """Their bytes are what was written; a decoder could make something of them, and no two would make the same."""
    encoding, record = STRANGE[kind]
    batch, row = of_one_batch(with_record(make_folder, monkeypatch, encoding=encoding, record=record), backend, events)
    assert [index for index, valid in enumerate(batch.valid.tolist()) if not valid] == [row]


@pytest.mark.parametrize("kind", UNUSUAL)
def test_unusual_pictures_are_what_pillow_says(
    kind: str, backend: str, make_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, events: EventLog
) -> None:
    """Also those that the C++ decoders leave to Pillow."""
    encoding, record, tolerance = UNUSUAL[kind]
    batch, row = of_one_batch(with_record(make_folder, monkeypatch, encoding=encoding, record=record), backend, events)
    assert batch.valid.all()
    wanted = torch.from_numpy(np.asarray(Image.open(io.BytesIO(record))).astype(np.float32)).permute(2, 0, 1)
    assert ((batch.images[row] * STD + MEAN) - wanted).abs().max() < tolerance


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("native", [True, False], ids=["C++", "Python"])
def test_records_are_checked_alike_with_and_without_the_extension(
    native: bool, encoding: str, damaged: Damage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first bad one is named; the others pass, as often as they are asked for."""
    with ShardReader(damaged(BAD, 25, encoding=encoding), "train") as reader:
        if not native:
            monkeypatch.setattr(ShardReader, "native_records", None)
        good = np.array([29, 0, 16, 18, 0])
        reader.check(good)
        reader.check(good)
        with pytest.raises(BadRecordError, match=f"{BAD:09d}") as caught:
            reader.check(np.array([25, 3, BAD]))
        assert caught.value.sample_id == BAD


def test_a_record_that_does_not_exist_is_refused_by_the_extension(damaged: Damage) -> None:
    with ShardReader(damaged(), "train") as reader:
        if reader.native_records is None:
            pytest.skip("no C++ extension")
        for wrong in (-1, 30):
            with pytest.raises(ValueError, match="no such record"):
                reader.native_records.damaged(np.array([0, wrong]))


@pytest.mark.skipif(native().module is None, reason="without the C++ extension the process ends there")
@pytest.mark.parametrize("backend", ["native", "twin"])
@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_a_shard_that_is_cut_short_while_it_is_mapped(encoding: str, backend: str, damaged: Damage, events: EventLog) -> None:
    """Touching what is gone makes the system send SIGBUS."""
    folder = damaged(encoding=encoding)
    loader = open_loader(folder, backend, events)
    os.truncate(folder / "train" / "000001.tar", 0)
    with pytest.raises(BadRecordError, match="cannot be read") as caught:
        list(loader)
    assert 12 <= caught.value.sample_id < 24
    assert str(folder / "train" / "000001.tar") in str(caught.value.where)
    loader.close()


def test_no_record_stands_in_for_all(damaged: Damage, events: EventLog) -> None:
    with ShardReader(damaged(), "train") as reader:
        for policy in ("skip", "substitute"):
            bad = BadRecords(reader, policy=policy, events=events)
            with pytest.raises(DataError, match="too many bad records"):
                bad.restore(" ".join(map(str, range(30))))


def test_a_split_of_one_bad_record(make_folder: Callable[..., Path], pixels: np.ndarray, events: EventLog) -> None:
    folder = make_folder(pixels[:1])
    with ShardReader(folder, "train") as reader:
        path, offset = reader.shard_paths[0], int(reader.records.offsets[0])
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    loader = open_loader(folder, "native", events, on_bad_record="skip", batch_size=1)
    with pytest.raises(DataError, match="too many bad records"):
        list(loader)
    loader.close()
