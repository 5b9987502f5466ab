"""Generated images: 10 shapes x 10 colours, so that everything works where there is no data set and no network.

Each image is one anti-aliased shape ("red star") at a random place, size and angle, lit and tinted at random, on a blotched
background that is never close to its colour, with noise. The shapes are signed distances, so a pixel's coverage is a clip
of the distance and nothing is supersampled: 14,000 images take about three seconds. Only + - * / sqrt, min and max are used on
float32 and integers, which IEEE arithmetic fixes to the bit, so the images do not depend on numpy's version or the CPU.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pairclip_fast.data.keyed import permutation, random_bits, random_uniform
from pairclip_fast.data.sources.base import ImageSet
from pairclip_fast.events import EventLog

Floats = npt.NDArray[np.float32]
Distance = Callable[[Floats, Floats], Floats]

TRAIN_IMAGES = 12_000
TEST_IMAGES = 2_000
CHUNK_IMAGES = 100
"""Images drawn at a time: small enough for the cache, and one of each class."""
COLOURS = {
    "red": (215, 35, 35),
    "orange": (245, 140, 20),
    "yellow": (245, 225, 45),
    "green": (40, 150, 55),
    "cyan": (55, 205, 215),
    "blue": (40, 70, 205),
    "purple": (125, 45, 170),
    "pink": (250, 150, 190),
    "brown": (115, 70, 35),
    "white": (245, 245, 245),
}
NOISE_LEVELS = 10.0
"""Largest standard deviation of the noise, of 255."""
MAX_SINE = 0.38
"""The angle lies within +-22 degrees."""


def _polygon(*vertices: tuple[float, float]) -> Distance:
    """Signed distance to a simple polygon, negative inside.

    Source: I. Quilez, "2D distance functions" (sdPolygon).
    """

    def distance(x: Floats, y: Floats) -> Floats:
        nearest = np.full_like(x, 1e9)
        inside = np.zeros(x.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(vertices, (*vertices[1:], vertices[0]), strict=True):
            ex, ey = np.float32(bx - ax), np.float32(by - ay)
            px, py = x - np.float32(ax), y - np.float32(ay)
            along = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
            dx, dy = px - ex * along, py - ey * along
            nearest = np.minimum(nearest, dx * dx + dy * dy)
            if ey != 0.0:
                inside ^= ((y >= np.float32(ay)) != (y >= np.float32(by))) & (px < py * (ex / ey))
        root = np.sqrt(nearest)
        signed: Floats = np.where(inside, -root, root)
        return signed

    return distance


def _circle(cx: float, cy: float, radius: float) -> Distance:
    def distance(x: Floats, y: Floats) -> Floats:
        dx, dy = x - np.float32(cx), y - np.float32(cy)
        outside: Floats = np.sqrt(dx * dx + dy * dy) - np.float32(radius)
        return outside

    return distance


def _union(*parts: Distance) -> Distance:
    return lambda x, y: np.minimum.reduce([part(x, y) for part in parts])


def _without(whole: Distance, hole: Distance) -> Distance:
    return lambda x, y: np.maximum(whole(x, y), -hole(x, y))


def _shapes() -> dict[str, Distance]:
    """Name -> signed distance in a frame where the shape about fills the unit circle; y points down."""
    tips = ((0.0, -1.0), (0.951, -0.309), (0.588, 0.809), (-0.588, 0.809), (-0.951, -0.309))
    dents = ((0.247, -0.340), (0.399, 0.130), (0.0, 0.420), (-0.399, 0.130), (-0.247, -0.340))
    star = [point for pair in zip(tips, dents, strict=True) for point in pair]
    a, b = 0.3, 0.9
    cross = [(-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a), (a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)]
    arrow = [(-0.95, -0.22), (0.1, -0.22), (0.1, -0.65), (0.98, 0.0), (0.1, 0.65), (0.1, 0.22), (-0.95, 0.22)]
    return {
        "circle": _circle(0.0, 0.0, 0.85),
        "square": _polygon((-0.74, -0.74), (0.74, -0.74), (0.74, 0.74), (-0.74, 0.74)),
        "triangle": _polygon((0.0, -0.95), (0.92, 0.7), (-0.92, 0.7)),
        "star": _polygon(*star),
        "cross": _polygon(*cross),
        "ring": _without(_circle(0.0, 0.0, 0.92), _circle(0.0, 0.0, 0.5)),
        "heart": _union(
            _circle(-0.42, -0.32, 0.48), _circle(0.42, -0.32, 0.48), _polygon((0.0, -0.5), (0.78, 0.0), (0.0, 0.92), (-0.78, 0.0))
        ),
        "moon": _without(_circle(0.1, 0.0, 0.92), _circle(0.55, -0.1, 0.72)),
        "arrow": _polygon(*arrow),
        "diamond": _polygon((0.0, -1.0), (0.55, 0.0), (0.0, 1.0), (-0.55, 0.0)),
    }


def class_names() -> tuple[str, ...]:
    """The 100 names; class = shape * 10 + colour."""
    return tuple(f"{colour} {shape}" for shape in _shapes() for colour in COLOURS)


def read_shapes(part: str, *, num_images: int, seed: int, size: int, events: EventLog) -> ImageSet:
    """Draw the images of one part; the classes come in turn, so that they differ by at most one image.

    Args:
        part: `train` or `test`; parts share no random number.
        num_images: Images to draw.
        seed: Seed of everything.
        size: Side of a tile.
        events: For progress.
    """
    names = class_names()
    labels = np.arange(num_images, dtype=np.int64) % len(names)
    labels = labels[permutation(num_images, seed=seed, stream=f"shapes/{part}/order")]
    images = np.empty((num_images, size, size, 3), dtype=np.uint8)
    with events.progress(f"drawing {part} images", num_images, unit="images") as advance:
        for start in range(0, num_images, CHUNK_IMAGES):
            chunk = slice(start, min(start + CHUNK_IMAGES, num_images))
            images[chunk] = _draw(labels[chunk], size=size, seed=seed, stream=f"shapes/{part}/{start}")
            advance(chunk.stop - chunk.start)
    return ImageSet(images=images, labels=labels, class_names=names, source="shapes")


class _Dice:
    """Random arrays of one chunk, each from its own named stream."""

    def __init__(self, *, seed: int, stream: str) -> None:
        self.seed, self.stream, self.drawn = seed, stream, 0

    def uniform(self, low: float, high: float, *shape: int) -> Floats:
        self.drawn += 1
        values = random_uniform(int(np.prod(shape)), seed=self.seed, stream=f"{self.stream}/{self.drawn}")
        return (low + (high - low) * values).astype(np.float32).reshape(shape)

    def noise(self, *shape: int) -> Floats:
        """Roughly normal, standard deviation 1: the sum of four uniform 16-bit numbers of one random word."""
        self.drawn += 1
        bits = random_bits(int(np.prod(shape)), seed=self.seed, stream=f"{self.stream}/{self.drawn}")
        total = sum(((bits >> np.uint64(16 * part)) & np.uint64(0xFFFF)).astype(np.int64) for part in range(4))
        centred = np.asarray(total).astype(np.float32) * np.float32(1 / 65_536) - np.float32(2.0)
        return (centred * np.float32(3.0**0.5)).reshape(shape)


def _draw(labels: npt.NDArray[np.int64], *, size: int, seed: int, stream: str) -> npt.NDArray[np.uint8]:
    """uint8 [n, size, size, 3] of the given classes."""
    dice = _Dice(seed=seed, stream=stream)
    count = len(labels)
    colour = np.array(list(COLOURS.values()), dtype=np.float32)[labels % len(COLOURS)]
    colour = colour + dice.uniform(-14.0, 14.0, count, 3)
    background = _background(colour, size, dice)
    coverage = _coverage(labels // len(COLOURS), size, dice)[..., None]
    light = dice.uniform(0.78, 1.08, count, 1, 1, 1)
    picture = (background + (colour[:, None, None, :] - background) * coverage) * light
    picture = picture + dice.noise(count, size, size, 3) * dice.uniform(0.0, NOISE_LEVELS, count, 1, 1, 1)
    return (np.clip(picture, 0.0, 255.0) + np.float32(0.5)).astype(np.uint8)


def _coverage(shapes: npt.NDArray[np.int64], size: int, dice: _Dice) -> Floats:
    """Share of each pixel that the shape covers, float32 [n, size, size]."""
    count = len(shapes)
    radius = dice.uniform(0.27, 0.44, count, 1, 1) * np.float32(size)
    room = np.float32(0.5 * size) - radius
    centre_x = np.float32(0.5 * size) + dice.uniform(-1.0, 1.0, count, 1, 1) * room
    centre_y = np.float32(0.5 * size) + dice.uniform(-1.0, 1.0, count, 1, 1) * room
    sine = dice.uniform(-MAX_SINE, MAX_SINE, count, 1, 1)
    cosine = np.sqrt(np.float32(1.0) - sine * sine)
    axis = np.arange(size, dtype=np.float32) + np.float32(0.5)
    x = (axis[None, None, :] - centre_x) / radius
    y = (axis[None, :, None] - centre_y) / radius
    turned_x, turned_y = x * cosine + y * sine, y * cosine - x * sine
    coverage = np.empty((count, size, size), dtype=np.float32)
    for number, distance in enumerate(_shapes().values()):
        chosen = np.flatnonzero(shapes == number)
        if len(chosen):
            pixels = distance(turned_x[chosen], turned_y[chosen]) * radius[chosen]
            coverage[chosen] = np.clip(np.float32(0.5) - pixels, 0.0, 1.0)
    return coverage


def _background(colour: Floats, size: int, dice: _Dice) -> Floats:
    """Blotches of two muted colours, float32 [n, size, size, 3]; of three drawn, the ones farthest from the shape's colour."""
    count = len(colour)

    def muted() -> Floats:
        grey = dice.uniform(20.0, 225.0, count, 3, 1)
        candidates = np.clip(grey + dice.uniform(-45.0, 45.0, count, 3, 3), 0.0, 255.0)
        difference = candidates - colour[:, None, :]
        apart = difference * difference
        farthest = np.argmax(apart[..., 0] + apart[..., 1] + apart[..., 2], axis=1)
        chosen: Floats = candidates[np.arange(count), farthest]
        return chosen

    first, second = muted(), muted()
    blend = _blotches(count, size, dice)[..., None]
    return first[:, None, None, :] + (second - first)[:, None, None, :] * blend


def _blotches(count: int, size: int, dice: _Dice) -> Floats:
    """Smooth random fields in [0, 1], float32 [n, size, size]: a 4 x 4 grid, interpolated linearly."""
    cells = 4
    grid = dice.uniform(0.0, 1.0, count, cells, cells)
    at = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32((cells - 1) / size)
    low = np.minimum(at.astype(np.int64), cells - 2)
    share = at - low.astype(np.float32)
    rows = grid[:, low, :] + (grid[:, low + 1, :] - grid[:, low, :]) * share[None, :, None]
    return rows[:, :, low] + (rows[:, :, low + 1] - rows[:, :, low]) * share[None, None, :]
