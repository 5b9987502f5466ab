"""One image file to one uint8 tile, or a reason why not. The only place where foreign picture bytes are decoded.

The header is judged before a pixel is decoded, so that a 2 kB file claiming 50,000 x 50,000 costs nothing (Pillow's own
guard only warns below 179 million pixels). What has one obvious meaning is converted (grey, palette, 16-bit grey, opaque
alpha, EXIF rotation); what has not (transparency, CMYK, animation) is a bad image.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from pairclip_fast.errors import DataError
from pairclip_fast.events import EventLog

MAX_PIXELS = 1 << 24
"""4096 x 4096: 50 MB decoded."""
BAD_BUDGET = 0.001
"""Largest share of images that `--on-bad skip` may leave out."""
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    TypeError,
    KeyError,
    IndexError,
    AttributeError,
    OverflowError,
    ZeroDivisionError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
"""What Pillow's decoders raise on damaged bytes (found by fuzzing; most are OSError and SyntaxError)."""


class BadImageError(Exception):
    """This image cannot be used; the text says why."""


def decode_tile(data: bytes, *, size: int) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    """Decode and resize one image.

    Args:
        data: The bytes of an image file.
        size: Side of the tile.

    Returns:
        uint8 [size, size, 3], and the width and height it had.

    Raises:
        BadImageError: not an image, truncated, too large, transparent, CMYK or another colour model, animated.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of what we check ourselves
        try:
            return _decode(data, size)
        except PILLOW_ERRORS as error:
            reason = "not an image" if isinstance(error, UnidentifiedImageError) else f"damaged or not an image ({error})"
            raise BadImageError(reason) from error


def _decode(data: bytes, size: int) -> tuple[npt.NDArray[np.uint8], tuple[int, int]]:
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BadImageError(f"{width} x {height} pixels, more than {MAX_PIXELS:,}")
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise BadImageError(f"animated ({getattr(image, 'n_frames', 0)} frames)")
    image.load()
    if "exif" in image.info or image.format in ("JPEG", "MPO", "TIFF"):
        image = ImageOps.exif_transpose(image)
    shown = image.size
    rgb = _to_rgb(image)
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(rgb), shown


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert what has one obvious meaning."""
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        image = image.convert("RGBA")
        lowest = image.getchannel("A").getextrema()[0]
        if lowest != 255:
            raise BadImageError(f"transparent (alpha down to {lowest}): which background is meant is unknown")
        return image.convert("RGB")
    if image.mode.startswith("I;16"):
        wide = np.asarray(image).astype(np.uint32)  # convert("RGB") would clip at 255 instead of scaling
        return Image.fromarray(((wide * 255 + 32_767) // 65_535).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGB", "L", "1", "YCbCr"):
        return image.convert("RGB")
    raise BadImageError(f"colour mode {image.mode}")


class ImageCollector:
    """Decodes the images of a source one by one, and applies the policy for bad ones.

    Args:
        where: The source, for errors.
        on_bad: `raise` or `skip`.
        size: Side of a tile.
        events: Told once if images are resized.
    """

    def __init__(self, *, where: object, on_bad: str, size: int, events: EventLog) -> None:
        self.where, self.on_bad, self.size, self.events = where, on_bad, size, events
        self.skipped: list[dict[str, str]] = []
        self.seen = 0
        self._tiles: list[npt.NDArray[np.uint8]] = []
        self._resized = 0
        self._first_size: tuple[int, int] | None = None

    def add(self, data: bytes | BadImageError | None, *, name: str) -> bool:
        """Take one image, or the reason why there is none; False if it was bad and left out.

        Raises:
            DataError: it is bad and the policy is to stop.
        """
        self.seen += 1
        try:
            if data is None:
                raise BadImageError("no bytes")
            if isinstance(data, BadImageError):
                raise data
            tile, shown = decode_tile(data, size=self.size)
        except BadImageError as error:
            if self.on_bad == "raise":
                fix = "repair or remove it, or leave bad images out with --on-bad skip"
                raise DataError("bad image", where=f"{self.where}: {name}", got=error, fix=fix) from error
            self.skipped.append({"where": name, "reason": str(error)})
            return False
        self._tiles.append(tile)
        if shown != (self.size, self.size):
            self._resized += 1
            self._first_size = self._first_size or shown
        return True

    def finish(self) -> npt.NDArray[np.uint8]:
        """All good images, uint8 [n, size, size, 3].

        Raises:
            DataError: more than 0.1 % of the images were bad.
        """
        if len(self.skipped) > BAD_BUDGET * self.seen:
            listed = "; ".join(f"{bad['where']}: {bad['reason']}" for bad in self.skipped[:5])
            raise DataError(
                "too many bad images to skip",
                where=self.where,
                expected=f"at most {BAD_BUDGET:.1%} of {self.seen:,}",
                got=f"{len(self.skipped):,}: {listed}",
            )
        if self.skipped:
            self.events.note(f"{len(self.skipped)} bad images left out of {self.where}", skipped=self.skipped)
        if self._first_size is not None:
            first, wanted = "{} x {}".format(*self._first_size), f"{self.size} x {self.size}"
            self.events.note(f"{self._resized:,} of {len(self._tiles):,} images are resized to {wanted} (the first was {first})")
        if not self._tiles:
            return np.zeros((0, self.size, self.size, 3), dtype=np.uint8)
        return np.stack(self._tiles)
