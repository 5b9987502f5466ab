"""`shard` as a user meets it: same bytes every time, nothing changed by a second run, whole or absent after any crash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import pytest
from dying_disk import DyingDisk, PowerCut

from pairclip_fast.data.build import build_folder
from pairclip_fast.data.commands import render_shard, render_verify, run_verify
from pairclip_fast.data.folder_plan import contents_digest, ids_digest, plan_folder
from pairclip_fast.data.manifest import read_manifest
from pairclip_fast.data.options import ShardOptions
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.data.sources import open_source
from pairclip_fast.data.writer import ShardFormat
from pairclip_fast.errors import ConfigError, DataError, RunBusyError, StorageError
from pairclip_fast.events import EventLog
from pairclip_fast.storage import REAL, FileSystem

Shard = Callable[..., dict[str, Any]]
Tree = Callable[[Path], dict[str, bytes | None]]
GOLDEN_SHAPES_DIGEST = "ac4266228b8183b86ef4b1a24919e49b00213e5982a6c91f8895d5e24173e07d"
"""Of 300 shapes at seed 0, raw. It changes only with the format, the pairing or the drawing: say so in the commit."""


def test_a_tiny_shapes_folder_has_golden_bytes(tmp_path: Path, events: EventLog) -> None:
    options = ShardOptions(source="shapes", out=tmp_path / "data", shard_size=100)
    sources = open_source("shapes", path=None, test_path=None, seed=0, on_bad="raise", events=events, num_images=300)
    shard_format = ShardFormat(encoding="raw", shard_size=100)
    manifest, action = build_folder(options, plan_folder(sources, options), shard_format, events=events, fs=REAL)
    assert (action, manifest) == ("written", read_manifest(options.out))
    assert manifest.digest == GOLDEN_SHAPES_DIGEST
    assert {name: split.count for name, split in manifest.splits.items()} == {"train": 200, "val": 100, "test": 50}
    assert run_verify(options.out, events)["ok"]


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
def test_same_arguments_give_the_same_bytes(shard: Shard, tree: Tree, tmp_path: Path, encoding: str) -> None:
    shard(out=tmp_path / "a", encoding=encoding)
    shard(out=tmp_path / "b", encoding=encoding)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_another_seed_gives_other_bytes(shard: Shard, tmp_path: Path) -> None:
    first, second = shard(out=tmp_path / "a"), shard(out=tmp_path / "b", seed=1)
    assert first["digest"] != second["digest"]


def test_summary_and_manifest(shard: Shard, make_photos: Callable[..., Path], tmp_path: Path, events: EventLog) -> None:
    summary = shard(test_path=make_photos("test", first_seed=600, per_class=3), val_fraction=0.25, num_pairs=50)
    assert json.loads(json.dumps(summary)) == summary
    assert summary["action"] == "written"
    assert summary["splits"] == {
        "train": {"pairs": 50, "images": 24},
        "val": {"pairs": 8, "images": 8},
        "test": {"pairs": 12, "images": 12},
    }
    assert "50 train, 8 val, 12 test" in render_shard(summary)
    manifest = read_manifest(tmp_path / "data")
    assert manifest.class_names == ("blue whale", "crow", "dingo", "eel")
    assert [shard.count for shard in manifest.splits["train"].shards] == [10] * 5
    assert manifest.digest == summary["digest"]
    assert "12 test" in render_verify(run_verify(tmp_path / "data", events))


def test_mean_and_std_are_those_of_the_training_images(shard: Shard, tmp_path: Path) -> None:
    shard(num_pairs=24, val_fraction=0.25)
    with ShardReader(tmp_path / "data", "train") as reader:
        lefts = reader.tiles_of(np.arange(24))[:, 0].reshape(-1, 3).astype(np.float64)  # each image once
        assert np.allclose(reader.manifest.mean, lefts.mean(axis=0))
        assert np.allclose(reader.manifest.std, lefts.std(axis=0))


def test_the_proof_is_recomputable_from_the_samples(shard: Shard, tmp_path: Path) -> None:
    shard()
    seen: dict[str, set[str]] = {}
    for split in ("train", "val"):
        with ShardReader(tmp_path / "data", split) as reader:
            contents, ids = set(), set()
            for sample_id in range(len(reader)):
                facts = json.loads(bytes(reader.member(sample_id, "json")))
                ids |= {facts["left_source"], facts["right_source"]}
                contents |= {hashlib.sha256(tile.tobytes()).digest() for tile in reader.tiles(sample_id)}
            entry = reader.manifest.splits[split]
            assert (entry.ids_sha256, entry.contents_sha256) == (ids_digest(ids), contents_digest(contents))
            seen[split] = ids
    assert not seen["train"] & seen["val"]
    assert len(seen["train"] | seen["val"]) == 32


def test_copies_stay_on_one_side_and_test_copies_are_noted(
    shard: Shard, photo_folder: Path, make_photos: Callable[..., Path], tmp_path: Path
) -> None:
    for name in ("crow", "dingo"):  # the same picture, thrice, in two classes
        for number in range(2):
            shutil.copy(photo_folder / "crow" / "000.png", photo_folder / name / f"copy{number}.png")
    for seed in range(3):
        summary = shard(out=tmp_path / f"data{seed}", seed=seed, val_fraction=0.5, test_path=_copy_of(photo_folder, tmp_path))
        assert summary["split_proof"] == {
            "shared_ids": 0,
            "shared_contents_train_val": 0,
            "duplicate_images": 5,
            "test_contents_in_train": 32,
        }
        assert any("32 test pictures also occur" in note for note in summary["notes"])


def _copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "same-pictures", dirs_exist_ok=True))


def test_second_run_changes_nothing_and_says_so(shard: Shard, tree: Tree, tmp_path: Path) -> None:
    shard()
    (tmp_path / "data" / "captions.safetensors").write_bytes(b"added later")
    before = {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "data").rglob("*"))}
    summary = shard()
    assert summary["action"] == "unchanged"
    assert "nothing to do" in render_shard(summary)
    assert {path: path.stat().st_mtime_ns for path in sorted((tmp_path / "data").rglob("*"))} == before


def test_other_arguments_need_overwrite(shard: Shard, photo_folder: Path, tmp_path: Path) -> None:
    first = shard()
    with pytest.raises(ConfigError, match="seed = 0") as caught:
        shard(seed=1)
    assert "--overwrite" in str(caught.value)
    second = shard(seed=1, overwrite=True)
    assert second["action"] == "written"
    assert second["digest"] != first["digest"]
    shutil.copy(photo_folder / "crow" / "000.png", photo_folder / "crow" / "more.png")
    with pytest.raises(ConfigError, match="source_sha256"):
        shard(seed=1)


def test_damaged_folder_is_not_called_unchanged(shard: Shard, tmp_path: Path) -> None:
    shard()
    (tmp_path / "data" / "train" / "000001.tar").unlink()
    with pytest.raises(DataError, match="missing"):
        shard()
    assert shard(overwrite=True)["action"] == "written"


@pytest.mark.parametrize("foreign", ["notes.txt", "train/photo.png", ".git/config", "train/sub/000000.tar"])
def test_a_folder_with_anything_foreign_is_never_replaced(shard: Shard, tree: Tree, tmp_path: Path, foreign: str) -> None:
    shard()
    (tmp_path / "data" / foreign).parent.mkdir(exist_ok=True)
    (tmp_path / "data" / foreign).write_bytes(b"mine")
    before = tree(tmp_path / "data")
    with pytest.raises(ConfigError, match="not just a data folder"):
        shard(seed=1, overwrite=True)
    assert tree(tmp_path / "data") == before


def test_a_file_or_somebody_elses_folder_is_refused_before_any_work(shard: Shard, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes(b"a file")
    with pytest.raises(ConfigError):
        shard(overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train").mkdir()
    with pytest.raises(ConfigError, match=r"no manifest\.json"):
        shard(out=tmp_path / "other", overwrite=True)


def test_an_empty_folder_is_a_free_name(shard: Shard, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert shard()["action"] == "written"


def test_dry_run_touches_nothing(shard: Shard, tree: Tree, tmp_path: Path) -> None:
    before = tree(tmp_path)
    summary = shard(dry_run=True)
    assert summary["action"] == "planned"
    assert summary["splits"]["train"]["pairs"] == 28
    assert summary["bytes"] > 0
    assert tree(tmp_path) == before
    assert "not touched" in render_shard(summary)


def test_no_space_is_found_out_before_writing(shard: Shard, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    before = tree(tmp_path)
    with pytest.raises(StorageError, match="not enough space"):
        shard()
    assert tree(tmp_path) == before


def test_the_space_is_that_of_the_disk_a_link_leads_to(shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "data").symlink_to(tmp_path / "disk" / "data")
    asked: list[Path] = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    shard()
    assert asked == [tmp_path / "disk"]
    assert run_verify(tmp_path / "disk" / "data", EventLog(console=False))["ok"]


def test_a_mount_point_is_refused_before_any_work(shard: Shard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard()
    (tmp_path / "empty").mkdir()
    mounted = {tmp_path / "data", tmp_path / "empty"}
    monkeypatch.setattr(Path, "is_mount", lambda path: path in mounted)
    assert shard()["action"] == "unchanged"
    monkeypatch.setattr("pairclip_fast.data.commands.open_source", None)
    for options in ({"seed": 1, "overwrite": True}, {"out": tmp_path / "empty"}):
        with pytest.raises(ConfigError, match="mount point") as caught:
            shard(**options)
        assert "give a folder inside it" in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"val_fraction": 0.0},
        {"val_fraction": 1.0},
        {"different_class_prob": 1.5},
        {"shard_size": 0},
        {"num_pairs": 0},
        {"seed": -1},
        {"template": "{a}"},
        {"template": "{left}\n{right}"},
        {"template": "\udce9 {left} {right}"},
        {"test_path": Path("x")},
    ],
)
def test_wrong_options_are_refused_when_made(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        ShardOptions(**wrong)


# --- crashes --------------------------------------------------------------------------------------------------------


Build = Callable[..., None]


@pytest.fixture
def build(photo_folder: Path, events: EventLog) -> Build:
    """Build a folder from plans made once: build(out, seed=0, overwrite=True, fs=REAL)."""
    sources = open_source("imagefolder", path=photo_folder, test_path=None, seed=0, on_bad="raise", events=events)
    plans = {seed: plan_folder(sources, ShardOptions(seed=seed)) for seed in (0, 1)}

    def run(out: Path, *, seed: int = 0, overwrite: bool = True, fs: FileSystem | None = None) -> None:
        shard_format = ShardFormat(encoding="raw", shard_size=20)
        options = ShardOptions(out=out, seed=seed, overwrite=overwrite)
        build_folder(options, plans[seed], shard_format, events=events, fs=fs or DyingDisk())

    return run


def test_killed_at_any_operation_the_folder_is_absent_or_whole(build: Build, tree: Tree, tmp_path: Path) -> None:
    count = DyingDisk()
    build(tmp_path / "wanted" / "data", fs=count)
    wanted = tree(tmp_path / "wanted" / "data")
    assert count.count > 20
    for last in range(count.count):
        folder = tmp_path / f"crash{last}"
        with pytest.raises(PowerCut):
            build(folder / "data", fs=DyingDisk(last))
        if (folder / "data").exists():
            assert tree(folder / "data") == wanted
            continue
        build(folder / "data")
        assert tree(folder / "data") == wanted
        assert [path.name for path in folder.iterdir()] == ["data"]


def test_killed_while_replacing_the_folder_is_the_old_or_the_new_one(build: Build, tree: Tree, tmp_path: Path) -> None:
    new, old = tmp_path / "new" / "data", tmp_path / "old" / "data"
    build(new, seed=1)
    build(old)
    wanted, before = tree(new), tree(old)
    count = DyingDisk()
    build(Path(shutil.copytree(old, tmp_path / "count" / "data")), seed=1, fs=count)
    for last in range(count.count):
        folder = tmp_path / f"crash{last}"
        shutil.copytree(old, folder / "data")
        with pytest.raises(PowerCut):
            build(folder / "data", seed=1, fs=DyingDisk(last))
        if (folder / "data").exists():
            assert tree(folder / "data") in (before, wanted)
        else:  # between the two renames: both are there, and the next run finds them
            assert [tree(path) for path in folder.iterdir() if ".trash-" in path.name] == [before]
        build(folder / "data", seed=1)
        assert tree(folder / "data") == wanted
        assert [path.name for path in folder.iterdir()] == ["data"]


class DiesBetweenRenames(FileSystem):
    """The old folder is moved away, and then the power goes."""

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        if source.name == "data":
            raise PowerCut

    def remove_tree(self, path: Path) -> None:
        if path.exists():
            raise PowerCut


def test_what_a_killed_replacement_moved_away_comes_back(build: Build, tree: Tree, tmp_path: Path) -> None:
    build(tmp_path / "data")
    before = tree(tmp_path)
    with pytest.raises(PowerCut):
        build(tmp_path / "data", seed=1, fs=DiesBetweenRenames())
    assert not (tmp_path / "data").exists()
    with pytest.raises(ConfigError, match="--overwrite"):
        build(tmp_path / "data", seed=1, overwrite=False)
    assert tree(tmp_path) == before


def test_leftovers_of_another_machine_are_cleared(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PowerCut):
        build(tmp_path / "out" / "data", fs=DyingDisk(10))
    monkeypatch.setattr(socket, "gethostname", lambda: "another-container")
    build(tmp_path / "out" / "data")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["data"]


class Meanwhile(FileSystem):
    """Does something else once: before the first folder is made, or before the first file is."""

    def __init__(self, action: Callable[[], object], *, at: str) -> None:
        self.action, self.at, self.done = action, at, False

    def _reached(self, at: str) -> None:
        if at == self.at and not self.done:
            self.done = True
            self.action()

    def mkdir(self, path: Path) -> None:
        self._reached("folder")
        super().mkdir(path)

    def open_for_writing(self, path: Path) -> IO[bytes]:
        self._reached("file")
        return super().open_for_writing(path)


def test_a_second_run_at_the_same_time_is_refused_and_told_of_the_first(shard: Shard, tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(RunBusyError, match=f"pid {os.getpid()} on "):
            shard(seed=1, overwrite=True)

    disk = Meanwhile(second, at="file")
    first = shard(fs=disk)
    assert disk.done
    assert read_manifest(tmp_path / "data").digest == first["digest"]
    assert {path.name for path in tmp_path.iterdir()} == {"data", "photos"}


def test_a_folder_made_since_the_first_look_is_kept(shard: Shard, tree: Tree, tmp_path: Path) -> None:
    def first() -> None:
        shard(out=tmp_path / "data")
        (tmp_path / "data" / "captions.safetensors").write_bytes(b"embedded")

    assert shard(fs=Meanwhile(first, at="folder"))["action"] == "unchanged"
    before = tree(tmp_path / "data")
    assert before["captions.safetensors"] == b"embedded"
    (tmp_path / "data").rename(tmp_path / "kept")
    with pytest.raises(ConfigError, match="--overwrite"):
        shard(seed=1, fs=Meanwhile(first, at="folder"))
    assert tree(tmp_path / "data") == before


def test_everything_is_synced_before_it_gets_its_name(shard: Shard) -> None:
    disk = DyingDisk()
    shard(fs=disk)
    assert disk.unsafe_renames == []


def test_a_writer_that_does_not_sync_would_be_caught(shard: Shard) -> None:
    """The control of the test above."""
    disk = DyingDisk(forget_fsync=True)
    shard(fs=disk)
    assert disk.unsafe_renames


class FullDisk(FileSystem):
    def write(self, file: IO[bytes], data: bytes | memoryview) -> None:
        if file.name.endswith("000001.tar"):
            raise OSError(28, "No space left on device")
        super().write(file, data)


def test_a_disk_that_fills_up_leaves_nothing_behind(shard: Shard, tree: Tree, tmp_path: Path) -> None:
    before = tree(tmp_path)
    with pytest.raises(StorageError, match="No space left"):
        shard(fs=FullDisk())
    assert tree(tmp_path) == before


def test_a_failure_that_nobody_expected_leaves_nothing_behind(shard: Shard, tree: Tree, tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    before = tree(tmp_path)
    with pytest.raises(ZeroDivisionError):
        shard(fs=Meanwhile(fail, at="file"))
    assert tree(tmp_path) == before


class NoCommit(FileSystem):
    """The second rename of a replacement fails."""

    def rename(self, source: Path, target: Path) -> None:
        if ".tmp-" in source.name and source.is_dir():
            raise OSError(5, "Input/output error")
        super().rename(source, target)


def test_a_replacement_that_fails_gives_the_old_folder_back(shard: Shard, tree: Tree, tmp_path: Path) -> None:
    shard()
    before = tree(tmp_path)
    with pytest.raises(StorageError):
        shard(seed=1, overwrite=True, fs=NoCommit())
    assert tree(tmp_path) == before


def test_manifest_digest_ignores_wording_only(shard: Shard, tmp_path: Path) -> None:
    shard()
    manifest = read_manifest(tmp_path / "data")
    assert dataclasses.replace(manifest, notes=("other",), description="other").digest == manifest.digest
    assert dataclasses.replace(manifest, template="{left}").digest != manifest.digest
    assert msgspec.json.decode((tmp_path / "data" / "manifest.json").read_bytes())["format"] == 1


@pytest.mark.timeout(180)
def test_real_images(cifar100_folder: Path, tmp_path: Path, events: EventLog) -> None:
    """CIFAR-100's train part has copies, some of them under two labels; they stay together."""
    options = ShardOptions(source="parquet", path=cifar100_folder / "train.parquet", out=tmp_path / "data", dry_run=True)
    sources = open_source("parquet", path=options.path, test_path=None, seed=0, on_bad="raise", events=events)
    plan = plan_folder(sources, options)
    assert {name: len(split.samples) for name, split in plan.splits.items()} == {"train": 45_000, "val": 5_000}
    assert (plan.proof.shared_ids, plan.proof.shared_contents_train_val, plan.proof.duplicate_images) == (0, 0, 28)
    assert np.allclose(plan.mean, (129.30, 124.07, 112.43), atol=0.5)  # the well-known values of the whole train part
