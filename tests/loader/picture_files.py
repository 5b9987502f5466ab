"""PNG and JPEG files of every kind for 32x64 pictures: by Pillow, or byte by byte where Pillow does not write the kind."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"


def pictures_of(count: int) -> np.ndarray:
    """Gradients with some noise: every filter of PNG finds something to predict."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0:32, 0:64]
    waves = 128 + 100 * np.sin(rows * rng.uniform(0, 0.4, (count, 3, 1, 1)) + columns * rng.uniform(0, 0.4, (count, 3, 1, 1)))
    return np.clip(waves + rng.normal(0, 4, waves.shape), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1).copy()


def saved(picture: np.ndarray, kind: str, *, mode: str | None = None, **options: Any) -> bytes:
    """By Pillow; `mode` says what four channels mean."""
    file = io.BytesIO()
    image = Image.fromarray(picture) if mode is None else Image.frombytes(mode, picture.shape[1::-1], picture.tobytes())
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def made_png(rows: bytes, *, header: tuple[int, ...] = (64, 32, 8, 2, 0, 0, 0), pieces: int = 1, extra: bytes = b"") -> bytes:
    """A PNG from filtered rows, its data in so many chunks."""
    data = zlib.compress(rows)
    cut = [len(data) * k // pieces for k in range(pieces + 1)]
    parts = b"".join(chunk(b"IDAT", data[a:b]) for a, b in itertools.pairwise(cut))
    return SIGNATURE + chunk(b"IHDR", struct.pack(">IIBBBBB", *header)) + extra + parts + chunk(b"IEND", b"")


def filtered(picture: np.ndarray, filters: list[int]) -> bytes:
    """Rows with the filters of the PNG specification applied, byte by byte."""
    rows, above = [], [0] * 192
    for row, kind in zip(picture.reshape(32, 192).tolist(), filters, strict=True):
        out = [kind]
        for i, value in enumerate(row):
            left, up, corner = (row[i - 3], above[i], above[i - 3]) if i >= 3 else (0, above[i], 0)
            estimate = left + up - corner
            paeth = min((abs(estimate - left), 0, left), (abs(estimate - up), 1, up), (abs(estimate - corner), 2, corner))[2]
            out.append((value - [0, left, up, (left + up) // 2, paeth][kind]) % 256)
        rows.append(bytes(out))
        above = row
    return b"".join(rows)


def interlaced_png(picture: np.ndarray) -> bytes:
    """Adam7: seven pictures, each a finer grid of pixels."""
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    rows = [b"\0" + row.tobytes() for y, x, down, across in passes for row in picture[y::down, x::across]]
    return made_png(b"".join(rows), header=(64, 32, 8, 2, 0, 0, 1))


def sixteen_bit_png(picture: np.ndarray) -> bytes:
    """The same pixels as high bytes, and 77 as each low byte."""
    rows = [b"\0" + np.stack([row, np.full_like(row, 77)], axis=1).tobytes() for row in picture.reshape(32, 192)]
    return made_png(b"".join(rows), header=(64, 32, 16, 2, 0, 0, 0))
