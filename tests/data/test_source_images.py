"""Single images: what is converted, what is refused, and that a bomb costs nothing. Then folders of them."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pairclip_fast.data.manifest import read_manifest
from pairclip_fast.data.sources import open_source
from pairclip_fast.data.sources.decode import BadImageError, decode_tile
from pairclip_fast.errors import DataError

Png = Callable[..., bytes]
GRADIENT = np.stack([np.arange(1024).reshape(32, 32) // 4] * 3, axis=-1).astype(np.uint8)
EXIF_ORIENTATION = 0x0112


def tile_of(data: bytes) -> np.ndarray:
    return decode_tile(data, size=32)[0]


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def test_lossless_pictures_come_back_exactly(png: Png) -> None:
    for kind in ("PNG", "BMP", "PPM", "TIFF"):
        assert (tile_of(png(GRADIENT, kind)) == GRADIENT).all()


def test_modes_with_one_meaning_are_converted(png: Png) -> None:
    picture = Image.fromarray(GRADIENT)
    assert (tile_of(png(picture.convert("L"))) == GRADIENT).all()
    assert (tile_of(png(picture.convert("RGBA"))) == GRADIENT).all()
    assert (tile_of(png(picture.convert("LA"))) == GRADIENT).all()
    assert (tile_of(png(picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=256))) == GRADIENT).mean() > 0.9
    black_white = tile_of(png(picture.convert("1")))
    assert set(np.unique(black_white)) == {0, 255}


def test_16_bit_grey_is_scaled_not_clipped(png: Png) -> None:
    wide = (np.arange(1024, dtype=np.uint32).reshape(32, 32) * 64).astype(np.uint16)
    got = tile_of(png(Image.fromarray(wide)))
    assert np.abs(got[..., 0].astype(float) - wide / 257.0).max() <= 0.51


def test_exif_rotation_is_applied(png: Png) -> None:
    picture = np.zeros((32, 32, 3), dtype=np.uint8)
    picture[:16] = 255  # bright above
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = 6  # to be turned clockwise by 90 degrees: bright on the right
    for kind in ("JPEG", "PNG"):
        tile = tile_of(png(picture, kind, exif=exif.tobytes()))
        assert tile[:, 17:].mean() > 250 > 5 > tile[:, :15].mean()


def bad_images() -> dict[str, bytes]:
    def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **options)
        return file.getvalue()

    picture = Image.fromarray(GRADIENT)
    see_through = picture.convert("RGBA")
    see_through.putpixel((0, 0), (0, 0, 0, 128))
    palette = picture.convert("P")
    other = Image.fromarray(255 - GRADIENT)
    whole = saved(picture)
    return {
        "empty": b"",
        "text": b"hello",
        "truncated PNG": whole[: len(whole) // 2],
        "truncated JPEG": saved(Image.effect_noise((64, 64), 50).convert("RGB"), "JPEG")[:1500],
        "flipped PNG": whole[:60] + bytes([whole[60] ^ 255]) + whole[61:],
        "transparent": saved(see_through),
        "transparent palette": saved(palette, transparency=palette.getpixel((0, 0))),
        "transparent colour": saved(picture, transparency=(0, 0, 0)),
        "CMYK": saved(picture.convert("CMYK"), "JPEG"),
        "float": saved(Image.fromarray(GRADIENT[..., 0].astype(np.float32)), "TIFF"),
        "32-bit integer": saved(Image.fromarray(GRADIENT[..., 0].astype(np.int32)), "TIFF"),
        "animated GIF": saved(picture, "GIF", save_all=True, append_images=[other]),
        "animated PNG": saved(picture, "PNG", save_all=True, append_images=[other]),
        "animated WEBP": saved(picture, "WEBP", save_all=True, append_images=[other]),
        "multi-page TIFF": saved(picture, "TIFF", save_all=True, append_images=[other]),
        "bomb": png_claiming(50_000, 50_000),
        "bomb below Pillow's guard": png_claiming(10_000, 8_000),
        "wide bomb": png_claiming(1 << 30, 1),
        "zero width": png_claiming(0, 5),
        "icon": saved(picture, "ICO"),
    }


@pytest.mark.parametrize("name", bad_images())
def test_bad_images_are_refused_with_a_reason(name: str) -> None:
    with pytest.raises(BadImageError) as caught:
        tile_of(bad_images()[name])
    assert str(caught.value)


def test_a_bomb_costs_no_memory() -> None:
    data = png_claiming(50_000, 50_000)
    assert len(data) < 2_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20):
        with pytest.raises(BadImageError, match=r"pixels|exceeds"):
            tile_of(data)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


WHOLE = {kind: io.BytesIO() for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")}
for _kind, _file in WHOLE.items():
    Image.fromarray(GRADIENT).save(_file, _kind)


@given(st.sampled_from(sorted(WHOLE)), st.data())
def test_fuzzed_images_raise_only_our_error(kind: str, data: st.DataObject) -> None:
    whole = bytearray(WHOLE[kind].getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(BadImageError):
        assert tile_of(bytes(whole[: data.draw(st.integers(0, len(whole)))])).shape == (32, 32, 3)


def test_other_sizes_are_resized_smoothly_and_said_once(photo_folder: Path, png: Png, events: Any) -> None:
    fine = np.zeros((256, 128, 3), dtype=np.uint8)
    fine[::2] = 255  # stripes of one pixel: without antialiasing they alias to black or white
    for name in ("crow", "dingo"):
        (photo_folder / name / "000.png").write_bytes(png(fine))
    source = open_source("imagefolder", path=photo_folder, test_path=None, seed=0, on_bad="raise", events=events)
    tile = source.train.images[8]
    assert tile.shape == (32, 32, 3)
    assert np.abs(tile.astype(int) - 127).max() <= 8
    assert [e["message"] for e in events.events if "resized" in e.get("message", "")] == [
        "2 of 32 images are resized to 32 x 32 (the first was 128 x 256)"
    ]


def test_image_folder_is_read_in_sorted_order(photo_folder: Path, events: Any, noise: Callable[[int], np.ndarray]) -> None:
    (photo_folder / ".hidden").mkdir()
    (photo_folder / "crow" / ".DS_Store").write_bytes(b"junk")
    shutil.copytree(photo_folder / "crow", photo_folder / "crow" / "small" / ".thumbs")
    (photo_folder / "readme.txt").write_bytes(b"beside the classes")
    train = open_source("imagefolder", path=photo_folder, test_path=None, seed=0, on_bad="raise", events=events).train
    assert train.class_names == ("blue whale", "crow", "dingo", "eel")
    assert train.ids is not None
    assert train.ids[:9] == (*(f"blue_whale/{k:03d}.png" for k in range(8)), "crow/000.png")
    assert train.labels.tolist() == sorted([0, 1, 2, 3] * 8)
    assert (train.images[17] == noise(2001)).all()


def test_a_bad_file_stops_with_its_name(photo_folder: Path, events: Any) -> None:
    (photo_folder / "dingo" / "004.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"dingo/004\.png") as caught:
        open_source("imagefolder", path=photo_folder, test_path=None, seed=0, on_bad="raise", events=events)
    assert caught.value.exit_code == 3
    assert "--on-bad skip" in str(caught.value)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda file: os.truncate(file, (64 << 20) + 1), "67,108,865 bytes, more than"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "not a plain file"),
        (lambda file: (file.unlink(), file.symlink_to("nowhere")), "No such file"),
        (None, "cannot be read: Input/output error"),
    ],
    ids=["too large", "pipe", "broken link", "bad disk"],
)
def test_a_file_without_bytes_is_refused_with_the_reason(
    photo_folder: Path, events: Any, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[Path], object] | None, reason: str
) -> None:
    def fail(path: Path) -> bytes:
        raise OSError(5, "Input/output error")

    if spoil is None:
        monkeypatch.setattr(Path, "read_bytes", fail)
    else:
        spoil(photo_folder / "dingo" / "004.png")
    with pytest.raises(DataError, match="bad image") as caught:
        open_source("imagefolder", path=photo_folder, test_path=None, seed=0, on_bad="raise", events=events)
    assert reason in str(caught.value.got)


def test_skipping_has_a_budget(photo_folder: Path, events: Any) -> None:
    (photo_folder / "dingo" / "004.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match="too many bad images") as caught:
        open_source("imagefolder", path=photo_folder, test_path=None, seed=0, on_bad="skip", events=events)
    assert "0.1% of 32" in str(caught.value)
    assert "dingo/004.png" in str(caught.value)


def test_skipped_images_are_counted_and_named(photo_folder: Path, shard: Callable[..., dict[str, Any]], png: Png, events: Any) -> None:
    plain = png(np.zeros((1, 1, 3), dtype=np.uint8))
    for number in range(1_000):
        (photo_folder / "eel" / f"plain{number:04d}.png").write_bytes(plain)
    (photo_folder / "dingo" / "004.png").write_bytes(b"not an image")
    (photo_folder / "dingo" / "005.png").unlink()
    (photo_folder / "dingo" / "005.png").symlink_to("nowhere")
    with pytest.raises(DataError, match="too many"):
        shard(on_bad="skip", different_class_prob=0.0)
    (photo_folder / "dingo" / "005.png").unlink()
    summary = shard(on_bad="skip", different_class_prob=0.0, shard_size=5_000, num_pairs=10)
    assert summary["skipped"] == 1
    assert read_manifest(Path(summary["out"])).skipped == ({"where": "dingo/004.png", "reason": "not an image"},)
    assert "dingo/004.png" in events.messages()


def test_sources_without_enough(tmp_path: Path, photo_folder: Path, events: Any) -> None:
    def opened(path: Path, **options: Any) -> None:
        open_source("imagefolder", path=path, test_path=None, seed=0, on_bad="raise", events=events, **options)

    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        opened(tmp_path / "empty")
    (tmp_path / "one" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="too few classes"):
        opened(tmp_path / "one")
    for file in (photo_folder / "crow").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="without images") as caught:
        opened(photo_folder)
    assert "crow" in str(caught.value)
    assert "others have 8 to 8" in str(caught.value)
    (photo_folder / "c_row").mkdir()
    (photo_folder / "c row").mkdir()
    with pytest.raises(DataError, match="same name"):
        opened(photo_folder)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "x" * 201, "_", "\u202e"])
def test_class_names_that_would_break_captions_are_refused(photo_folder: Path, events: Any, name: str) -> None:
    (photo_folder / name).mkdir()
    with pytest.raises(DataError, match="class name"):
        open_source("imagefolder", path=photo_folder, test_path=None, seed=0, on_bad="raise", events=events)


def test_test_parts(photo_folder: Path, make_photos: Callable[..., Path], tmp_path: Path, events: Any) -> None:
    test = make_photos("test", first_seed=700, per_class=2)
    sources = open_source("imagefolder", path=photo_folder, test_path=test, seed=0, on_bad="raise", events=events)
    assert sources.test is not None
    assert len(sources.test.labels) == 8
    (tmp_path / "both").mkdir()
    shutil.move(photo_folder, tmp_path / "both" / "train")
    shutil.move(test, tmp_path / "both" / "test")
    again = open_source("imagefolder", path=tmp_path / "both", test_path=None, seed=0, on_bad="raise", events=events)
    assert again.test is not None
    assert (again.test.images == sources.test.images).all()
    (tmp_path / "both" / "test" / "dingo").rename(tmp_path / "both" / "test" / "dog")
    with pytest.raises(DataError, match="other classes") as caught:
        open_source("imagefolder", path=tmp_path / "both", test_path=None, seed=0, on_bad="raise", events=events)
    assert (caught.value.expected, caught.value.got) == ("dingo", "dog")


def test_a_folder_beside_train_that_is_no_test_part_is_refused(photo_folder: Path, tmp_path: Path, events: Any) -> None:
    def opened(path: Path) -> Any:
        return open_source("imagefolder", path=path, test_path=None, seed=0, on_bad="raise", events=events)

    for name in ("train", "val"):
        shutil.copytree(photo_folder, tmp_path / "both" / name)
    (tmp_path / "flat" / "test").mkdir(parents=True)
    shutil.copytree(photo_folder, tmp_path / "flat" / "train")
    for tree, other in (("both", "val"), ("flat", "test")):
        with pytest.raises(DataError, match="mixes train with others") as caught:
            opened(tmp_path / tree)
        assert caught.value.got == other
        assert f"--path {tmp_path / tree / 'train'}" in str(caught.value)
    shutil.rmtree(tmp_path / "both" / "val")
    (tmp_path / "both" / ".cache").mkdir()
    assert opened(tmp_path / "both").test is None


def test_links_to_folders_are_followed_but_not_in_a_circle(photo_folder: Path, tmp_path: Path, events: Any) -> None:
    shutil.move(photo_folder / "crow", tmp_path / "elsewhere")
    (photo_folder / "crow").mkdir()
    (photo_folder / "crow" / "first").symlink_to(tmp_path / "elsewhere")
    (photo_folder / "crow" / "second").symlink_to(tmp_path / "elsewhere")
    train = open_source("imagefolder", path=photo_folder, test_path=None, seed=0, on_bad="raise", events=events).train
    assert train.ids is not None
    assert [name for name in train.ids if name.endswith("007.png")][1:3] == ["crow/first/007.png", "crow/second/007.png"]
    (tmp_path / "elsewhere" / "back").symlink_to(photo_folder / "crow")
    with pytest.raises(DataError, match="leads back"):
        open_source("imagefolder", path=photo_folder, test_path=None, seed=0, on_bad="raise", events=events)


def test_file_names_that_are_no_text_can_be_written_down(photo_folder: Path, shard: Callable[..., dict[str, Any]]) -> None:
    (photo_folder / "crow" / "000.png").rename(photo_folder / "crow" / b"\xff\xfe\n.png".decode("utf-8", "surrogateescape"))
    folder = photo_folder.rename(photo_folder.with_name(b"im\xffgs".decode("utf-8", "surrogateescape")))
    summary = shard(path=folder)
    assert read_manifest(Path(summary["out"])).description == "image folder im\\xffgs"
