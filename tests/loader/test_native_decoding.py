"""PNG and JPEG in C++: Pillow's pixels or a refusal, whatever the bytes."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from picture_files import SIGNATURE, chunk, filtered, interlaced_png, made_png, pictures_of, saved, sixteen_bit_png
from PIL import Image
from test_native_core import CORE, make_filler, make_records

from pairclip_fast.data.backends.native import NativeExecutor
from pairclip_fast.data.backends.pictures import PictureStore
from pairclip_fast.data.loader import make_loader
from pairclip_fast.data.parameters import identity_table, own_tiles
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.events import EventLog
from pairclip_fast.native import native

pytestmark = pytest.mark.skipif(native().module is None, reason=native().reason)
SHAPE = (2, 32, 32, 3)


def needs(encoding: str) -> None:
    if CORE.decoder_library(encoding) is None:
        pytest.skip(f"the C++ extension was built without a decoder of {encoding}")


def decode(payloads: list[bytes], encoding: str) -> tuple[np.ndarray, list[int]]:
    ids = np.arange(len(payloads))
    pictures = np.zeros((len(payloads), 32, 64, 3), dtype=np.uint8)
    _, refused = make_filler(SHAPE, threads=2).decode(make_records(payloads), encoding, ids, ids, pictures)
    return pictures, refused


@pytest.mark.parametrize("filters", [[k] * 32 for k in range(5)] + [[k % 5 for k in range(32)]], ids=["0", "1", "2", "3", "4", "all"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_every_filter_of_png(filters: list[int], pieces: int) -> None:
    needs("png")
    noise = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    for picture in (noise, pictures_of(1)[0]):
        got, refused = decode([made_png(filtered(picture, filters), pieces=pieces)], "png")
        assert refused == []
        assert np.array_equal(got[0], picture)


@pytest.mark.parametrize("level", [0, 1, 6, 9])
def test_what_pillow_wrote(level: int) -> None:
    needs("png")
    pictures = pictures_of(20)
    got, refused = decode([saved(picture, "PNG", compress_level=level) for picture in pictures], "png")
    assert refused == []
    assert np.array_equal(got, pictures)


def test_jpeg_is_pillows_within_a_rounding() -> None:
    needs("jpeg")
    for options in ({"quality": 95, "subsampling": 0}, {"quality": 70}, {"progressive": True}):
        payloads = [saved(picture, "JPEG", **options) for picture in pictures_of(10)]
        got, refused = decode(payloads, "jpeg")
        wanted = np.stack([np.asarray(Image.open(io.BytesIO(payload))) for payload in payloads])
        assert refused == []
        assert abs(got.astype(int) - wanted.astype(int)).max() <= 3


def test_other_kinds_are_left_to_pillow() -> None:
    needs("png")
    needs("jpeg")
    picture = pictures_of(1)[0]
    plain = filtered(picture, [0] * 32)
    kinds = {
        "grey": saved(picture[..., 0], "PNG"),
        "palette": saved(picture[..., 0], "PNG", bits=4),
        "alpha": saved(np.dstack([picture, picture[..., :1]]), "PNG"),
        "16 bits": sixteen_bit_png(picture),
        "interlaced": interlaced_png(picture),
        "narrower": saved(picture[:, :63], "PNG"),
        "higher": made_png(plain, header=(64, 33, 8, 2, 0, 0, 0)),
        "huge": made_png(plain, header=(2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0)),
        "unknown filter": made_png(b"\5" + plain[1:]),
        "too few rows": made_png(plain[:-1]),
        "too many rows": made_png(plain + b"\0"),
        "critical chunk": made_png(plain, extra=chunk(b"PLTE", bytes(3))),
        "no data": made_png(b"")[:33] + chunk(b"IEND", b""),
        "empty": b"",
        "signature": SIGNATURE,
        "jpeg": saved(picture, "JPEG"),
    }
    _, refused = decode(list(kinds.values()), "png")
    assert [name for k, name in enumerate(kinds) if k not in refused] == []
    assert decode([made_png(plain, extra=chunk(b"tEXt", b"anything"))], "png")[1] == []
    cmyk = saved(np.dstack([picture, picture[..., :1]]), "JPEG", mode="CMYK")
    jpegs = [cmyk, saved(picture[..., 0], "JPEG"), saved(picture[:, :63], "JPEG"), b"", b"\xff\xd8", saved(picture, "PNG")]
    assert decode(jpegs, "jpeg")[1] == list(range(len(jpegs)))


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_damaged_bytes_are_refused_or_give_pillows_pixels(encoding: str) -> None:
    """Flips, cuts, insertions and repeats; the checksum of the record is made to fit, so the decoder sees them all."""
    needs(encoding)
    rng, payloads = random.Random(0), []
    originals = [saved(picture, encoding.upper(), **({"quality": 90} if encoding == "jpeg" else {})) for picture in pictures_of(10)]
    for _ in range(600):
        data = bytearray(rng.choice(originals))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[at : at + rng.randint(1, 400)]
            elif kind == 2:
                data[at:at] = rng.randbytes(rng.randint(1, 40))
            else:
                data[at : at + 4] = rng.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"IDAT", b"\xff\xda\0\0"])
            data = data or bytearray(1)
        payloads.append(bytes(data))
    got, refused = decode(payloads, encoding)
    assert len(refused) > 300
    if encoding == "png":
        for row in set(range(600)) - set(refused):
            assert np.array_equal(got[row], np.asarray(Image.open(io.BytesIO(payloads[row])).convert("RGB")))


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
@pytest.mark.parametrize("decoder", ["C++", "Pillow"])
def test_pictures_that_do_not_fit_in_memory_are_decoded_for_each_batch(encoding: str, decoder: str, folders: dict[str, Path]) -> None:
    needs(encoding)
    with ShardReader(folders[encoding], "train") as reader:
        executor = NativeExecutor(reader, augment=None, device=torch.device("cpu"), num_threads=2)
        decode = executor._decode if decoder == "C++" else None
        kept = PictureStore(reader, num_threads=2, decode=decode)
        passing = PictureStore(reader, num_threads=2, decode=decode, room_bytes=103 * 6144 - 1)
        assert (kept.resident, passing.resident) == (True, False)
        sources = np.random.default_rng(0).integers(0, 206, (30, 2))
        table = identity_table(30, tiles=2)
        for _ in range(2):
            results = []
            for store in (kept, passing):
                pictures, places = store.of(sources)
                images = np.empty((30, 3, 32, 64), dtype=np.float32)
                make_filler(SHAPE).fill_pictures(pictures, places, table, images)
                results.append(images)
            assert np.array_equal(*results)
        assert kept.bytes_read * 1.5 < passing.bytes_read
        assert np.array_equal(own_tiles(np.arange(3), tiles=2), kept.of(own_tiles(np.arange(3), tiles=2))[1])
        for store in (kept, passing):
            store.close()
            store.close()
        executor.close()


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_a_build_without_the_library_decodes_with_pillow_and_says_so(
    encoding: str, folders: dict[str, Path], events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"split": "train", "batch_size": 16, "augment": None, "seed": 5, "device": torch.device("cpu")}
    monkeypatch.setattr(CORE, "decoder_library", lambda encoding: None)
    poor = make_loader(folders[encoding], backend="native", events=events, **settings)
    (event,) = events.fallbacks
    assert (event["what"], event["chosen"]) == (f"decoding of {encoding}", "Pillow")
    reference = make_loader(folders[encoding], backend="reference", events=events, **settings)
    for first, second in zip(poor, reference, strict=True):
        assert (first.images - second.images).abs().max() < 1e-5
    poor.close()
    reference.close()
