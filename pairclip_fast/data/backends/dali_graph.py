"""The DALI graph: from members of the shards to normalised tiles side by side, the same operators on CPU and GPU.

It decides nothing by itself: which records, and every parameter, are fed in (`fn.external_source`). Traps that it avoids,
each silent in DALI 2.4: outside pixels are edge copies unless `fill_value=0`; `warp_affine` counts in corner coordinates;
integers between operations round; on float input the contrast centre is 0.5; `saturation` goes through YIQ with rounded
constants (0.8 of 255 off at factors near 0 or 2). Hence all colour operations are one `coord_transform` with our matrix,
which is also 3 times cheaper than DALI's operators for them.

DALI knows no mirrored border. The graph makes one: as many mirrored pixels as the configuration can reach are set around
the tile (`flip`, slices, `cat`), and what lies beyond them is DALI's repeated edge, exactly as the specification has it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dali_math
import nvidia.dali.types as types
from jaxtyping import Float32, Int64
from nvidia.dali import Pipeline

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.augment import CONTRAST_CENTRE, LUMA, WHITE
from pairclip_fast.data.manifest import Manifest
from pairclip_fast.data.parameters import Column, changes_colour

Feed = dict[str, Any]
Kind = Literal["cpu", "gpu"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GraphSpec:
    """Everything the graph is built from. Operations that the configuration switches off are not in it."""

    encoding: Literal["raw", "png", "jpeg"]
    tiles: int
    height: int
    width: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    augment: AugmentConfig

    @classmethod
    def of(cls, manifest: Manifest, augment: AugmentConfig | None) -> GraphSpec:
        """The graph for a data folder; no augmentation is the configuration with all ranges 0."""
        return cls(
            encoding=manifest.encoding,
            tiles=manifest.tiles,
            height=manifest.tile_height,
            width=manifest.tile_width,
            mean=manifest.mean,
            std=manifest.std,
            augment=augment or AugmentConfig(),
        )

    @property
    def pictures(self) -> int:
        """Encoded pictures to decode per row: tiles that are paired anew come from different ones."""
        return self.tiles if self.augment.pairing == "resampled" else 1

    @property
    def moves(self) -> bool:
        """Whether a tile may come from another place of its picture."""
        return self.augment.pairing == "resampled" or self.augment.swap_probability > 0.0

    @property
    def mirrors(self) -> bool:
        """Whether anything mirrored can be seen."""
        return self.augment.border == "reflect" and bool(self.augment.rotate_degrees or self.augment.shift_pixels)

    @property
    def reach(self) -> tuple[int, int]:
        """Mirrored pixels needed above and below, left and right: the farthest point that rotation and shift sample, and the
        tap beyond it; at most what a tile has to mirror.
        """
        if not self.mirrors:
            return (0, 0)
        turned, half_y, half_x = math.radians(self.augment.rotate_degrees), (self.height - 1) / 2, (self.width - 1) / 2
        y, x = half_y + self.augment.shift_pixels, half_x + self.augment.shift_pixels

        def farthest(along: float, across: float) -> float:
            angle = min(turned, math.atan2(across, along))
            return math.cos(angle) * along + math.sin(angle) * across

        needed_y, needed_x = (math.ceil(farthest(*sides) - half) + 1 for sides, half in (((y, x), half_y), ((x, y), half_x)))
        return (min(needed_y, self.height - 1), min(needed_x, self.width - 1))

    @property
    def warps(self) -> bool:
        """Whether tiles are sampled; otherwise whole-pixel windows do. Past the mirrored pixels only sampling repeats the edge."""
        beyond = self.mirrors and self.augment.shift_pixels > min(self.reach)
        return bool(self.augment.rotate_degrees) or beyond


def make_pipeline(spec: GraphSpec, *, kind: Kind, device_id: int | None, batch_size: int, num_threads: int) -> Pipeline:
    """The pipeline, not yet built.

    With `kind` "gpu" and no device id it can be constructed and serialised without a GPU, which is how it is checked.
    """
    # One batch in flight: inputs are handed to `run`, which DALI allows for a queue of 1 only.
    pipeline = Pipeline(batch_size=batch_size, num_threads=num_threads, device_id=device_id, seed=0, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(graph(spec, kind=kind))
    return pipeline


def graph(spec: GraphSpec, *, kind: Kind) -> Any:
    """The operations from members of the shards to normalised pictures, float32 CHW; the same for both devices.

    Pictures must be RGB and of the right size: DALI would convert or cut others to fit without a word.
    """
    if spec.encoding == "raw":
        sample = fn.external_source(name="tiles", device=kind, layout="FHWC", dtype=types.UINT8, ndim=4)
        tiles = [sample[t] for t in range(spec.tiles)]
    else:
        # JPEG is decoded on the GPU; PNG, which DALI decodes on no GPU, by `mixed` on the CPU and then uploaded.
        # No decoder of ours turns pictures by their EXIF orientation.
        decoder = {"device": "cpu" if kind == "cpu" else "mixed", "output_type": types.RGB, "adjust_orientation": False}
        encoded = [fn.external_source(name=f"encoded{k}", device="cpu", dtype=types.UINT8, ndim=1) for k in range(spec.pictures)]
        pictures = [fn.decoders.image(picture, **decoder) for picture in encoded]
        tiles = [_part(spec, pictures[t % spec.pictures], t) for t in range(spec.tiles)]
    return fn.cat(*[_augment_tile(spec, tile, t) for t, tile in enumerate(tiles)], axis_name="W")


def _part(spec: GraphSpec, picture: Any, t: int) -> Any:
    """The tile for position `t` of a stacked picture."""
    if not spec.moves:
        return picture[:, t * spec.width : (t + 1) * spec.width]
    start = fn.external_source(name=f"column{t}", dtype=types.INT32, ndim=1)
    return fn.slice(picture, start=start, shape=[spec.width], axes=[1])


def _augment_tile(spec: GraphSpec, tile: Any, t: int) -> Any:
    augment = spec.augment
    if spec.mirrors:
        tile = _mirrored(spec, tile)
    if spec.warps:
        outside: Feed = {} if spec.mirrors else {"fill_value": 0.0}
        matrix = _parameter(f"matrix{t}", ndim=2)
        size = [spec.height, spec.width]
        tile = fn.warp_affine(tile, matrix=matrix, size=size, dtype=types.FLOAT, interp_type=types.INTERP_LINEAR, **outside)
    elif augment.shift_pixels:
        start = fn.external_source(name=f"start{t}", dtype=types.INT32, ndim=1)
        window = {"start": start, "shape": [spec.height, spec.width], "axes": [0, 1]}
        tile = fn.slice(tile, **window, out_of_bounds_policy="pad", fill_values=0.0)
    if changes_colour(augment):
        tile = fn.coord_transform(tile, M=_parameter(f"colour{t}", ndim=2), T=_parameter(f"offset{t}", ndim=1), dtype=types.FLOAT)
        tile = dali_math.clamp(tile, 0.0, WHITE)
    mirror = {"mirror": fn.external_source(name=f"flip{t}", dtype=types.INT32, ndim=0)} if augment.flip_probability else {}
    tile = fn.crop_mirror_normalize(tile, dtype=types.FLOAT, output_layout="CHW", mean=list(spec.mean), std=list(spec.std), **mirror)
    if augment.cutout_size:
        square = {"anchor": _parameter(f"cut{t}", ndim=1), "shape": _parameter(f"cut_shape{t}", ndim=1)}
        tile = fn.erase(tile, **square, axis_names="HW", fill_value=0.0)
    return tile


def _mirrored(spec: GraphSpec, tile: Any) -> Any:
    """The tile [H, W, 3] with `reach` mirrored pixels around it; the edge pixel itself is not repeated."""
    rows, columns = spec.reach
    if columns:
        turned = fn.flip(tile, horizontal=1)
        before, after = turned[:, spec.width - 1 - columns : spec.width - 1], turned[:, 1 : columns + 1]
        tile = fn.cat(before, tile, after, axis=1)
    if rows:
        turned = fn.flip(tile, horizontal=0, vertical=1)
        before, after = turned[spec.height - 1 - rows : spec.height - 1], turned[1 : rows + 1]
        tile = fn.cat(before, tile, after, axis=0)
    return tile


def _parameter(name: str, *, ndim: int) -> Any:
    """A float argument per sample. Arguments of operators are CPU tensors on both devices."""
    return fn.external_source(name=name, dtype=types.FLOAT, ndim=ndim)


def parameter_feed(spec: GraphSpec, sources: Int64[np.ndarray, "batch tiles"], table: Float32[np.ndarray, "batch tiles 10"]) -> Feed:
    """Sources and a parameter table as the named inputs of `graph`, records apart."""
    augment, feed = spec.augment, Feed()
    rows, columns = spec.reach
    for t in range(spec.tiles):
        parameters = table[:, t]
        if spec.encoding != "raw" and spec.moves:
            feed[f"column{t}"] = (sources[:, t, None] % spec.tiles * spec.width).astype(np.int32)
        if spec.warps:
            matrix = source_matrix(parameters, height=spec.height, width=spec.width)
            feed[f"matrix{t}"] = matrix + np.array([[0, 0, columns], [0, 0, rows]], dtype=np.float32)
        elif augment.shift_pixels:
            shifts = parameters[:, [Column.SHIFT_Y, Column.SHIFT_X]]
            feed[f"start{t}"] = np.ascontiguousarray((rows, columns) - shifts, dtype=np.int32)
        if changes_colour(augment):
            feed[f"colour{t}"], feed[f"offset{t}"] = colour_map(parameters)
        if augment.flip_probability:
            feed[f"flip{t}"] = parameters[:, Column.FLIP].astype(np.int32)
        if augment.cutout_size:
            feed[f"cut{t}"], feed[f"cut_shape{t}"] = cut_square(parameters, height=spec.height, width=spec.width)
    return feed


def source_matrix(parameters: Float32[np.ndarray, "batch 10"], *, height: int, width: int) -> Float32[np.ndarray, "batch 2 3"]:
    """Destination to source, R(angle) (destination - centre - shift) + centre, in corner coordinates (centre = side / 2)."""
    angle = np.deg2rad(parameters[:, Column.ANGLE].astype(np.float64))
    cosine, sine = np.cos(angle), np.sin(angle)
    centre_x, centre_y = width / 2, height / 2
    x, y = centre_x + parameters[:, Column.SHIFT_X], centre_y + parameters[:, Column.SHIFT_Y]
    rows = [cosine, -sine, centre_x - cosine * x + sine * y, sine, cosine, centre_y - sine * x - cosine * y]
    return np.stack(rows, axis=1).reshape(-1, 2, 3).astype(np.float32)


def colour_map(parameters: Float32[np.ndarray, "batch 10"]) -> tuple[Float32[np.ndarray, "batch 3 3"], Float32[np.ndarray, "batch 3"]]:
    """Saturation, contrast and brightness as one affine map of an RGB pixel; see `augment.recolour` for the formula."""
    brightness, contrast, saturation = (
        parameters[:, c].astype(np.float64)[:, None, None] for c in (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION)
    )
    luma = np.broadcast_to(np.array(LUMA), (3, 3))
    matrix = brightness * contrast * (saturation * np.eye(3) + (1.0 - saturation) * luma)
    offset = CONTRAST_CENTRE * brightness[:, 0] * (1.0 - contrast[:, 0]) * np.ones(3)
    return matrix.astype(np.float32), offset.astype(np.float32)


def cut_square(
    parameters: Float32[np.ndarray, "batch 10"], *, height: int, width: int
) -> tuple[Float32[np.ndarray, "batch 2"], Float32[np.ndarray, "batch 2"]]:
    """First row and column of the part of the square that lies in the tile, and its sides."""
    first = parameters[:, [Column.CUT_Y, Column.CUT_X]]
    sides = np.array([height, width], dtype=np.float32)
    start, end = first.clip(0, sides), (first + parameters[:, [Column.CUT_SIZE]]).clip(0, sides)
    return np.ascontiguousarray(start), np.ascontiguousarray(end - start)
