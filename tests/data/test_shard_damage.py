"""Byte surgery on data folders: the reader refuses what it can see, `verify` lists everything, nothing else escapes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pairclip_fast.cli import main
from pairclip_fast.data.commands import refuse_damage, run_verify
from pairclip_fast.data.index import parse_index
from pairclip_fast.data.manifest import ShardEntry, read_manifest
from pairclip_fast.data.records import derive_records, record_index_bytes
from pairclip_fast.data.shards import ShardReader, decode_payload
from pairclip_fast.data.tar import END_OF_ARCHIVE, index_text, read_members, ustar_member
from pairclip_fast.data.verify import verify_folder
from pairclip_fast.errors import ConfigError, DataError
from pairclip_fast.events import EventLog

Copy = Callable[..., Path]
FLIPS = 150


def problems(folder: Path, events: EventLog) -> dict[str, str]:
    return {finding.where: finding.problem for finding in verify_folder(folder, events=events)}


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
def test_a_whole_folder_has_no_findings(data_copy: Copy, events: EventLog, encoding: str) -> None:
    folder = data_copy(encoding)
    (folder / "captions.safetensors").write_bytes(b"the text room's")
    (folder / ".captions.safetensors.tmp-123").write_bytes(b"half")
    assert problems(folder, events) == {}
    summary = run_verify(folder, events)
    assert (summary["ok"], summary["splits"]) == (True, {"train": 33, "val": 8, "test": 12})
    refuse_damage(summary)


def test_everything_that_is_wrong_is_listed_at_once(data_copy: Copy, events: Any) -> None:
    folder = data_copy()
    train = folder / "train"
    (train / "000000.tar").write_bytes((train / "000000.tar").read_bytes()[:-512])
    (train / "000001.tar").unlink()
    flipped = bytearray((train / "000002.tar").read_bytes())
    flipped[3000] ^= 1
    (train / "000002.tar").write_bytes(flipped)
    (train / "000003.idx").write_bytes(b"v1.2 0\n")
    (folder / "val" / "000000.tar").rename(folder / "val" / "000007.tar")
    (folder / "test" / "000000.tar").unlink()
    (folder / "test" / "000000.tar").symlink_to("/etc/passwd")
    (folder / "notes.txt").write_bytes(b"")
    assert problems(folder, events) == {
        "notes.txt": "a foreign file: the manifest does not know it",
        "val/000007.tar": "a foreign file: the manifest does not know it",
        "train/000000.tar": "truncated",
        "train/000001.tar": "missing",
        "train/000002.tar": "changed",
        "train/000003.idx": "truncated",
        "val/000000.tar": "missing",
        "test/000000.tar": "not a plain file",
    }
    summary = run_verify(folder, events)
    assert {finding["where"] for finding in summary["findings"]} == set(problems(folder, events))
    with pytest.raises(DataError, match="8 findings") as caught:
        refuse_damage(summary)
    assert caught.value.exit_code == 3
    assert "train/000002.tar: changed" in events.messages()


def test_every_flipped_byte_is_found(data_copy: Copy, events: EventLog) -> None:
    """In headers, payloads, padding and indices alike; on one small split, for speed."""
    folder = data_copy()
    manifest = read_manifest(folder)
    path = folder / "val" / "000000.tar"
    whole = path.read_bytes()
    entry = manifest.splits["val"].shards[0]
    for position in random.Random(0).sample(range(len(whole)), FLIPS):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << (position % 8)
        assert hashlib.sha256(damaged).hexdigest() != entry.sha256
    path.write_bytes(damaged)
    assert problems(folder, events) == {"val/000000.tar": "changed"}


def test_a_shard_truncated_anywhere_is_refused(data_copy: Copy) -> None:
    folder = data_copy()
    path = folder / "train" / "000002.tar"
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 4_999), len(whole) - 1, len(whole) + 1]:
        path.write_bytes((whole + b"\0")[:size])
        with pytest.raises(DataError, match=r"000002\.tar") as caught:
            ShardReader(folder, "train")
        assert f"{len(whole):,} bytes" in str(caught.value.expected)
        assert f"{size:,}" in str(caught.value.got)


def test_missing_shard_and_missing_split(data_copy: Copy) -> None:
    folder = data_copy()
    (folder / "val" / "000000.tar").unlink()
    with pytest.raises(DataError, match="missing"):
        ShardReader(folder, "val")
    with pytest.raises(DataError, match="no such split"):
        ShardReader(folder, "holdout")


def test_an_extra_file_is_ignored_with_one_word(data_copy: Copy, events: Any) -> None:
    folder = data_copy()
    shutil.copy(folder / "val" / "000000.tar", folder / "val" / "000001.tar")
    with ShardReader(folder, "val", events=events) as reader:
        assert len(reader) == 8
    assert [event["message"] for event in events.events] == ["ignoring 1 files that the manifest does not know: val/000001.tar"]


@pytest.mark.parametrize("damage", ["missing", "stale", "empty", "shuffled"])
def test_a_bad_index_is_rebuilt_if_the_shard_is_intact(data_copy: Copy, events: Any, damage: str) -> None:
    folder = data_copy()
    with ShardReader(folder, "train") as reader:
        wanted = {extension: spans.offsets.copy() for extension, spans in reader.spans.items()}
        pixels = reader.tiles(15)
    index = folder / "train" / "000001.idx"
    lines = index.read_bytes().splitlines(keepends=True)
    if damage == "missing":
        index.unlink()
    else:
        other = (folder / "train" / "000000.idx").read_bytes()
        index.write_bytes({"stale": other, "empty": b"", "shuffled": b"".join([lines[0], *lines[:0:-1]])}[damage])
    with ShardReader(folder, "train", events=events) as reader:
        assert all((spans.offsets == wanted[extension]).all() for extension, spans in reader.spans.items())
        assert (reader.tiles(15) == pixels).all()
    assert [event["what"] for event in events.fallbacks] == ["index train/000001.idx"]


def test_a_bad_index_of_a_changed_shard_is_refused(data_copy: Copy) -> None:
    folder = data_copy()
    path = folder / "train" / "000001.tar"
    damaged = bytearray(path.read_bytes())
    damaged[700] ^= 1
    path.write_bytes(damaged)
    (folder / "train" / "000001.idx").unlink()
    with ShardReader(folder, "train") as reader, pytest.raises(DataError, match="neither the shard nor its index"):
        _ = reader.spans
    (folder / "train" / "000001.records").unlink()
    with pytest.raises(DataError, match="neither the shard nor its index"):
        ShardReader(folder, "train")


def rewrite_shard(folder: Path, split: str, change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> None:
    """Change members of shard 0 and make tar, indices and manifest agree again: the work of somebody who means it."""
    path = folder / split / "000000.tar"
    data = path.read_bytes()
    found = {m.name: data[m.offset : m.offset + m.size] for m in read_members(memoryview(data), where="x", max_members=999)}
    archive = b"".join(ustar_member(name, content) for name, content in change(found).items()) + END_OF_ARCHIVE
    members = list(read_members(memoryview(archive), where="x", max_members=999))
    index = index_text([members[start : start + 3] for start in range(0, len(members), 3)])
    path.write_bytes(archive)
    path.with_suffix(".idx").write_bytes(index)
    digest = hashlib.sha256(archive).hexdigest()
    with contextlib.suppress(DataError):  # of samples that no record index can tell of
        records = derive_records(memoryview(archive), members, num_captions=read_manifest(folder).num_captions, where="x")
        path.with_suffix(".records").write_bytes(record_index_bytes(records, tar_bytes=len(archive), tar_sha256=digest))
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["splits"][split]["shards"][0] |= {
        "bytes": len(archive),
        "sha256": digest,
        "index_bytes": len(index),
        "index_sha256": hashlib.sha256(index).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_facts(found: dict[str, bytes], name: str, **fields: Any) -> dict[str, bytes]:
    return found | {name: json.dumps(json.loads(found[name]) | fields).encode()}


MEANINGFUL_DAMAGE: dict[str, tuple[Callable[[dict[str, bytes]], dict[str, bytes]], str]] = {
    "caption of another id": (lambda m: m | {"000000003.txt": b"a cat"}, "not the caption of its id"),
    "caption id that is not left, right": (lambda m: change_facts(m, "000000003.json", caption_id=99), "the ids contradict each other"),
    "label out of range": (lambda m: change_facts(m, "000000003.json", left=-1), "the ids contradict each other"),
    "json that is none": (lambda m: m | {"000000003.json": b"{"}, "damaged"),
    "field missing": (lambda m: m | {"000000003.json": b"{}"}, "damaged"),
    "payload too short": (lambda m: m | {"000000003.rgb": m["000000003.rgb"][:-1]}, "a sample has the wrong size"),
    "one image with two contents": (
        lambda m: m | {"000000003.rgb": bytes(6144)},
        "a source image has other pixels here than in another pair",
    ),
    "image of another split": (
        lambda m: change_facts(m, "000000003.json", left_source="train/crow/000.png"),
        "the images of the split are not the manifest's",
    ),
    "samples in another order": (lambda m: dict(sorted(m.items(), reverse=True)), "wrong members"),
}


@pytest.mark.parametrize("name", MEANINGFUL_DAMAGE)
def test_verify_reads_what_the_samples_say(data_copy: Copy, events: EventLog, name: str) -> None:
    change, problem = MEANINGFUL_DAMAGE[name]
    folder = data_copy()
    rewrite_shard(folder, "val", change)
    assert problem in {finding.problem for finding in verify_folder(folder, events=events)}


def test_verify_sees_an_image_in_two_splits_even_if_every_digest_was_adapted(data_copy: Copy, events: EventLog) -> None:
    folder = data_copy()
    with ShardReader(folder, "train") as reader:
        source = json.loads(bytes(reader.member(0, "json")))["left_source"]
        pixels = bytes(reader.payload(0))[:3072]
    rewrite_shard(
        folder,
        "val",
        lambda m: change_facts(m, "000000003.json", left_source=source) | {"000000003.rgb": pixels + m["000000003.rgb"][3072:]},
    )
    found = problems(folder, events)
    assert found["train, val"] == "pictures with the same pixels in both splits"
    findings = [finding.problem for finding in verify_folder(folder, events=events)]
    assert "an image is in both splits" in findings


def test_damaged_json_is_refused_when_the_record_index_is_made(data_copy: Copy) -> None:
    for change in (
        lambda m: m | {"000000003.json": b"[]"},
        lambda m: change_facts(m, "000000003.json", caption_id=16),
        lambda m: change_facts(m, "000000003.json", caption_id=2**70),
    ):
        folder = data_copy()
        rewrite_shard(folder, "val", change)
        with pytest.raises(DataError, match="000000003"):
            ShardReader(folder, "val")
        shutil.rmtree(folder)


def bomb(width: int = 50_000, height: int = 50_000) -> bytes:
    """A PNG header that claims a great deal."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("payload", [bomb(), bomb(64, 31), bomb(64, 32), b"", b"not a picture"])
def test_bad_pictures_in_shards_are_refused(data_copy: Copy, events: EventLog, payload: bytes) -> None:
    folder = data_copy("png")
    manifest = read_manifest(folder)
    with pytest.raises(DataError, match="picture"):
        decode_payload(memoryview(payload), manifest, where="x")
    rewrite_shard(folder, "val", lambda m: m | {"000000003.png": payload})
    assert any("picture" in problem for problem in problems(folder, events).values())


# --- manifest and index: only our exceptions ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no manifest"),
        (b"", "damaged"),
        (b"{", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b"\xff\xfe", "damaged"),
        (b'{"format": 2}', "format version"),
        (b'{"format": "1"}', "damaged"),
        (b'{"format": 1}', "damaged"),
    ],
)
def test_bad_manifests(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        read_manifest(tmp_path)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("splits.train.shards.0.name", "../../etc/passwd"),
        ("splits.train.shards.0.name", "000001.tar"),
        ("splits.train.shards.0.count", 11),
        ("splits.train.shards.0.bytes", -1),
        ("splits.train.shards.0.sha256", "x"),
        ("splits.train.count", 0),
        ("splits", {}),
        ("splits.other", None),
        ("class_names", ["one"]),
        ("class_names", ["same", "same"]),
        ("encoding", "bmp"),
        ("tiles", 0),
        ("tile_width", 1 << 40),
        ("mean", [1, 2]),
        ("std", [0, 1, 1]),
    ],
)
def test_manifests_that_contradict_themselves(data_copy: Copy, path: str, value: Any) -> None:
    folder = data_copy()
    manifest = json.loads((folder / "manifest.json").read_bytes())
    *way, last = path.split(".")
    place: Any = manifest
    for step in way:
        place = place[int(step) if step.isdigit() else step]
    place[last] = place["train"] if value is None else value
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError):
        read_manifest(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 5_000), junk=st.binary(min_size=1, max_size=4))
def test_fuzzed_manifests_raise_only_our_error(data_copy: Copy, tmp_path: Path, position: int, junk: bytes) -> None:
    folder = tmp_path / "copy-raw" if (tmp_path / "copy-raw").exists() else data_copy()
    original = (folder / "manifest.original").read_bytes() if (folder / "manifest.original").exists() else None
    if original is None:
        original = (folder / "manifest.json").read_bytes()
        (folder / "manifest.original").write_bytes(original)
    position %= len(original)
    (folder / "manifest.json").write_bytes(original[:position] + junk + original[position + len(junk) :])
    try:
        ShardReader(folder, "val").close()
    except DataError as error:
        assert error.what


ENTRY = ShardEntry(name="000000.tar", count=1, bytes=512 * 7 + 1024, sha256="0" * 64, index_bytes=1, index_sha256="0" * 64)
GOOD_INDEX = b"v1.2 1\nrgb 512 600 000000005.rgb json 2048 3 000000005.json txt 3072 9 000000005.txt\n"


def test_a_good_index_is_read() -> None:
    table = parse_index(GOOD_INDEX, ENTRY, 5, ("rgb", "json", "txt"), where="x")
    assert table.tolist() == [[512, 600, 2048, 3, 3072, 9]]


@pytest.mark.parametrize(
    "change",
    [
        (b"v1.2", b"v1.1"),
        (b"v1.2 1", b"v1.2 2"),
        (b"512 600", b"512 601000"),
        (b"512 600", b"513 600"),
        (b"512 600", b"512 -600"),
        (b"512 600", b"99999999999999999999 600"),
        (b"512 600", b"x 600"),
        (b"000000005.rgb", b"000000006.rgb"),
        (b"rgb 512", b"png 512"),
        (b"3072 9", b"512 9"),
        (b"\n", b" extra\n"),
    ],
)
def test_bad_indices_are_refused(change: tuple[bytes, bytes]) -> None:
    with pytest.raises(DataError):
        parse_index(GOOD_INDEX.replace(*change), ENTRY, 5, ("rgb", "json", "txt"), where="x")


@given(st.binary(max_size=200) | st.integers(0, 80).map(lambda n: GOOD_INDEX[:n]))
def test_fuzzed_indices_raise_only_our_error(lines: bytes) -> None:
    with pytest.raises(DataError):
        parse_index(lines, ENTRY, 5, ("rgb", "json", "txt"), where="x")


def test_reader_views_survive_the_next_open(data_copy: Copy) -> None:
    folder = data_copy()
    with ShardReader(folder, "val") as first, ShardReader(folder, "val") as second:
        assert np.array_equal(first.tiles(0), second.tiles(0))


def test_the_caption_bank_is_read_too(data_copy: Copy, events: EventLog) -> None:
    def load(path: Path) -> None:
        raise DataError("this is not a caption bank", where=path)

    folder = data_copy()
    assert run_verify(folder, events, load_bank=load)["ok"]
    (folder / "captions.safetensors").write_bytes(b"noise")
    (finding,) = run_verify(folder, events, load_bank=load)["findings"]
    assert (finding["where"], finding["problem"]) == ("captions.safetensors", "this is not a caption bank")


def test_no_folder_is_no_damage(tmp_path: Path, events: EventLog) -> None:
    with pytest.raises(ConfigError, match="there is no data folder"):
        run_verify(tmp_path / "nothere", events)
    found = run_verify(tmp_path, events)
    assert (found["ok"], found["digest"]) == (False, None)


def test_the_command_prints_its_findings_and_fails(data_copy: Copy, capsys: pytest.CaptureFixture[str]) -> None:
    folder = data_copy()
    (folder / "notes.txt").write_bytes(b"")
    (folder / "captions.safetensors").write_bytes(b"noise")
    assert main(["verify", "--data", str(folder), "--json"]) == 3
    found = capsys.readouterr()
    assert [finding["where"] for finding in json.loads(found.out)["findings"]] == ["notes.txt", "captions.safetensors"]
    assert "2 findings" in found.err
