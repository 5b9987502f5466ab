"""The DALI backend: one graph for CPU and GPU, which decides nothing by itself.

The order of the samples and every parameter are fed in (`fn.external_source`), so the stream equals that of the other
backends; DALI's own readers repeat and drop samples in their obvious configuration, and its random numbers depend on the
batch size. One batch is run at a time, because the loader's thread already runs ahead of the consumer: nothing is left in
the pipeline when an epoch is broken off.

Traps that the graph avoids, each silent in DALI 2.4: outside pixels are edge copies unless `fill_value=0`; `warp_affine`
counts in corner coordinates; integers between operations round; on float input the contrast centre is 0.5; `saturation`
goes through YIQ with rounded constants (0.8 of 255 off at factors near 0 or 2). Hence all colour operations are one
`coord_transform` with our matrix, which is also 3 times cheaper than DALI's operators for them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as dali_math
import nvidia.dali.types as types
import torch
import torch.utils.dlpack
from jaxtyping import Float32, Int64
from nvidia.dali import Pipeline
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.augment import CONTRAST_CENTRE, LUMA, WHITE
from pairclip_fast.data.manifest import Manifest
from pairclip_fast.data.parameters import Column, changes_colour, own_tiles
from pairclip_fast.data.shards import BadRecordError, ShardReader
from pairclip_fast.errors import EnvironmentLackingError

Feed = dict[str, Any]
NO_GPU_MESSAGES = ("CUDA-capable GPU", "CUDA is not available")


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


class DaliExecutor:
    """Random access to the shards, decoding and augmentation in DALI; see `Executor`."""

    name = "dali"

    def __init__(
        self, reader: ShardReader, *, augment: AugmentConfig | None, batch_size: int, device: torch.device, num_threads: int
    ) -> None:
        self.bytes_read, self.helper_cpu_s = 0, 0.0
        self._reader, self._device = reader, device
        self._spec = GraphSpec.of(reader.manifest, augment)
        self._batch_size, self._num_threads = batch_size, num_threads
        self._pipeline: Pipeline | None = self._build()
        self._stream = None if device.type == "cpu" else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def _build(self) -> Pipeline:
        device, kind = self._device, "cpu" if self._device.type == "cpu" else "gpu"
        device_id = None if device.type == "cpu" else torch.cuda.current_device() if device.index is None else device.index
        pipeline = make_pipeline(
            self._spec, kind=kind, device_id=device_id, batch_size=self._batch_size, num_threads=self._num_threads
        )
        try:
            pipeline.build()
        except RuntimeError as error:
            if any(message in str(error) for message in NO_GPU_MESSAGES):
                fix = "use --device cpu, or install a CUDA driver"
                raise EnvironmentLackingError("DALI finds no GPU", where="--loader dali", got=error, fix=fix) from error
            raise
        return pipeline

    def fill(
        self, sources: Int64[np.ndarray, "batch tiles"], table: Float32[np.ndarray, "batch tiles 10"]
    ) -> Float32[Tensor, "batch 3 height width"]:
        assert self._pipeline is not None, "fill after close"
        ids = sources[:, 0] // self._spec.tiles
        assert np.array_equal(sources, own_tiles(ids, tiles=self._spec.tiles)), "not yet"
        pixels = self._pixels(ids)
        try:
            (pictures,) = self._pipeline.run(pixels=pixels, **parameter_feed(self._spec, table))
            images: Tensor = torch.utils.dlpack.from_dlpack(pictures.as_tensor())
        except RuntimeError as error:
            self._pipeline = self._build()  # DALI says that a pipeline is not to be used after an error
            self._blame(ids, error)
            raise
        return images if self._stream is None else self._owned_by_torch(images, self._stream)

    def close(self) -> None:
        self._pipeline = None

    def _owned_by_torch(self, images: Tensor, stream: torch.cuda.Stream) -> Tensor:
        """A copy on the device (microseconds). On the CPU DALI hands its buffer over; on a GPU it would take it back without
        waiting for kernels of torch. The copy has its own stream so as not to queue behind the training step.
        """
        with torch.cuda.stream(stream):
            copy = images.clone()
        stream.synchronize()
        copy.record_stream(torch.cuda.default_stream(images.device))
        return copy

    def _pixels(self, ids: Int64[np.ndarray, " batch"]) -> Any:
        payloads = [self._reader.payload(int(i)) for i in ids]
        for sample_id, payload in zip(ids.tolist(), payloads, strict=True):
            self._reader.check(sample_id, payload)
        self.bytes_read += sum(len(payload) for payload in payloads)
        if self._spec.encoding != "raw":
            return [np.frombuffer(payload, dtype=np.uint8) for payload in payloads]
        shape = (len(ids), self._spec.tiles, self._spec.height, self._spec.width, 3)
        joined = np.frombuffer(b"".join(payloads), dtype=np.uint8)
        if joined.size != np.prod(shape):
            self._blame(ids, None)
        return joined.reshape(shape)

    def _blame(self, ids: Int64[np.ndarray, " batch"], error: Exception | None) -> None:
        """Raise for the sample of a failed batch that Pillow rejects too: DALI does not say which one it was.

        If there is none the data is not to blame, and the caller's error stands.
        """
        for sample_id in ids.tolist():
            try:
                self._reader.tiles(sample_id)
            except BadRecordError as found:
                raise found from error
        if error is not None:
            error.add_note(f"while DALI filled the batch that starts with {self._reader.location(int(ids[0]))}")


def make_pipeline(spec: GraphSpec, *, kind: Literal["cpu", "gpu"], device_id: int | None, batch_size: int, num_threads: int) -> Pipeline:
    """The pipeline, not yet built.

    With `kind` "gpu" and no device id it can be constructed and serialised without a GPU, which is how it is checked.
    """
    # One batch in flight: inputs are handed to `run`, which DALI allows for a queue of 1 only.
    pipeline = Pipeline(batch_size=batch_size, num_threads=num_threads, device_id=device_id, seed=0, prefetch_queue_depth=1)
    with pipeline:
        pipeline.set_outputs(graph(spec, kind=kind))
    return pipeline


def graph(spec: GraphSpec, *, kind: Literal["cpu", "gpu"]) -> Any:
    """The operations from members of the shards to normalised pictures, float32 CHW; the same for both devices."""
    if spec.encoding == "raw":
        sample = fn.external_source(name="pixels", device=kind, layout="FHWC", dtype=types.UINT8, ndim=4)
        tiles = [sample[t] for t in range(spec.tiles)]
    else:
        encoded = fn.external_source(name="pixels", device="cpu", dtype=types.UINT8, ndim=1)
        picture = fn.decoders.image(encoded, device="cpu" if kind == "cpu" else "mixed", output_type=types.RGB)
        tiles = [picture[:, t * spec.width : (t + 1) * spec.width] for t in range(spec.tiles)]
    return fn.cat(*[_augment_tile(spec, tile, t) for t, tile in enumerate(tiles)], axis_name="W")


def _augment_tile(spec: GraphSpec, tile: Any, t: int) -> Any:
    augment = spec.augment
    if augment.rotate_degrees:
        matrix = _parameter(f"matrix{t}", ndim=2)
        tile = fn.warp_affine(tile, matrix=matrix, dtype=types.FLOAT, fill_value=0.0, interp_type=types.INTERP_LINEAR)
    elif augment.shift_pixels:
        start = fn.external_source(name=f"start{t}", dtype=types.INT32, ndim=1)
        window = {"start": start, "shape": [spec.height, spec.width], "axes": [0, 1]}
        tile = fn.slice(tile, **window, out_of_bounds_policy="pad", fill_values=0.0)
    if changes_colour(augment):
        tile = fn.coord_transform(tile, M=_parameter(f"colour{t}", ndim=2), T=_parameter(f"offset{t}", ndim=1), dtype=types.FLOAT)
        tile = dali_math.clamp(tile, 0.0, WHITE)
    mirror = {"mirror": fn.external_source(name=f"flip{t}", dtype=types.INT32, ndim=0)} if augment.flip_probability else {}
    return fn.crop_mirror_normalize(tile, dtype=types.FLOAT, output_layout="CHW", mean=list(spec.mean), std=list(spec.std), **mirror)


def _parameter(name: str, *, ndim: int) -> Any:
    """A float argument per sample. Arguments of operators are CPU tensors on both devices."""
    return fn.external_source(name=name, dtype=types.FLOAT, ndim=ndim)


def parameter_feed(spec: GraphSpec, table: Float32[np.ndarray, "batch tiles 10"]) -> Feed:
    """A parameter table as the named inputs of `graph`."""
    augment, feed = spec.augment, Feed()
    for t in range(spec.tiles):
        parameters = table[:, t]
        if augment.rotate_degrees:
            feed[f"matrix{t}"] = source_matrix(parameters, height=spec.height, width=spec.width)
        elif augment.shift_pixels:
            shifts = parameters[:, [Column.SHIFT_Y, Column.SHIFT_X]]
            feed[f"start{t}"] = np.ascontiguousarray(-shifts, dtype=np.int32)
        if changes_colour(augment):
            feed[f"colour{t}"], feed[f"offset{t}"] = colour_map(parameters)
        if augment.flip_probability:
            feed[f"flip{t}"] = parameters[:, Column.FLIP].astype(np.int32)
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
