"""The DALI backend: one pipeline for CPU and GPU, run a batch at a time.

The order of the samples and every parameter are fed in, so the stream equals that of the other backends; DALI's own
readers repeat and drop samples in their obvious configuration, and its random numbers depend on the batch size. Records
come from the mapped shards by `external_source` and not from DALI's reader with an index file written from the plan: that
needs a new pipeline every epoch, cannot pair tiles of different samples, opens a file per run of the index (a permutation
of 45,000 pairs in 9 shards ended with "Too many open files"), and took 13.6 against 6.3 us of CPU time per raw pair.
One batch is run at a time, because the loader's thread already runs ahead of the consumer: nothing is left in the pipeline
when an epoch is broken off. After an error the pipeline is built anew, since DALI calls it invalid from then on.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.utils.dlpack
from jaxtyping import Float32, Int64
from torch import Tensor

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.augment import augment_tiles
from pairclip_fast.data.backends.dali_graph import Feed, GraphSpec, make_pipeline, parameter_feed
from pairclip_fast.data.backends.raw_tiles import RawTiles
from pairclip_fast.data.backends.selfcheck import why_not
from pairclip_fast.data.parameters import Draw
from pairclip_fast.data.shards import BadRecordError, ShardReader
from pairclip_fast.data.upload import Uploads
from pairclip_fast.errors import EnvironmentLackingError

NO_GPU_MESSAGES = ("CUDA-capable GPU", "CUDA is not available", "driver is not installed or its version is insufficient")
TOLERANCE = {"raw": 0.25, "png": 0.25, "jpeg": 16.0}
"""Largest difference to torch in units of the 0..255 scale; decoders of JPEG on a GPU round differently, which colours amplify."""


class DaliExecutor:
    """Random access to the shards, decoding and augmentation in DALI; see `Executor`."""

    name = "dali"

    def __init__(
        self, reader: ShardReader, *, augment: AugmentConfig | None, batch_size: int, device: torch.device, num_threads: int
    ) -> None:
        self.bytes_read, self.helper_cpu_s = 0, 0.0
        self._reader, self._spec = reader, GraphSpec.of(reader.manifest, augment)
        self._raw = RawTiles(reader) if self._spec.encoding == "raw" else None
        on_cpu = device.type == "cpu"
        device_id = None if on_cpu else torch.cuda.current_device() if device.index is None else device.index
        self._settings: dict[str, Any] = {
            "kind": "cpu" if on_cpu else "gpu",
            "device_id": device_id,
            "batch_size": batch_size,
            "num_threads": num_threads,
        }
        self._pipeline: Any = self._build()
        self._uploads = None if on_cpu else Uploads(device)

    def fill(
        self, sources: Int64[np.ndarray, "batch tiles"], table: Float32[np.ndarray, "batch tiles 10"]
    ) -> Float32[Tensor, "batch 3 height width"]:
        feed = self._records(sources) | parameter_feed(self._spec, sources, table)
        if self._pipeline is None:
            self._pipeline = self._build()
        try:
            (pictures,) = self._pipeline.run(**feed)
            images: Tensor = torch.utils.dlpack.from_dlpack(pictures.as_tensor())
        except RuntimeError as error:
            self._pipeline = None
            self._blame(sources, error)
            raise
        # On the CPU DALI hands its buffer over; on a GPU it would take it back without waiting for kernels of torch.
        return images if self._uploads is None else self._uploads.beside(images.clone)

    def why_not(self, *, augment: AugmentConfig | None) -> str | None:
        """Why it cannot be used here; None if it makes the pictures that torch makes on the CPU."""
        reader, samples = self._reader, self._settings["batch_size"]
        spec, border = self._spec, self._spec.augment.border

        def plain(draw: Draw) -> Tensor:
            owners, tile = np.divmod(draw.sources, spec.tiles)
            ids, places = np.unique(owners, return_inverse=True)
            tiles = torch.from_numpy(reader.tiles_of(ids)[places.reshape(owners.shape), tile]).permute(0, 1, 4, 2, 3)
            return augment_tiles(tiles, torch.from_numpy(draw.table()), border=border, mean=spec.mean, std=spec.std)

        def ours(draw: Draw) -> Tensor:
            return self.fill(draw.sources, draw.table())

        same = {"like": plain, "reader": reader, "augment": augment}
        return why_not(ours, **same, moves=spec.moves, tolerance=TOLERANCE[spec.encoding], samples=samples)  # type: ignore[arg-type]

    def close(self) -> None:
        self._pipeline = None
        if self._raw is not None:
            self._raw.close()

    def _build(self) -> Any:
        pipeline = make_pipeline(self._spec, **self._settings)
        try:
            pipeline.build()
        except RuntimeError as error:
            if any(message in str(error) for message in NO_GPU_MESSAGES):
                fix = "use --loader reference or native, or install a CUDA driver that DALI can use"
                raise EnvironmentLackingError("DALI finds no GPU", where="--loader dali", got=error, fix=fix) from error
            raise
        return pipeline

    def _records(self, sources: Int64[np.ndarray, "batch tiles"]) -> Feed:
        """Raw tiles, or per row the encoded pictures that its tiles are parts of."""
        if self._raw is not None:
            tiles = self._raw.gather(sources)
            self.bytes_read += tiles.nbytes
            return {"tiles": tiles}
        owners = sources[:, : self._spec.pictures] // self._spec.tiles
        self._reader.check(owners)
        payloads = [[np.frombuffer(self._reader.payload(i), dtype=np.uint8) for i in column] for column in owners.T.tolist()]
        self.bytes_read += sum(len(payload) for column in payloads for payload in column)
        return {f"encoded{k}": column for k, column in enumerate(payloads)}

    def _blame(self, sources: Int64[np.ndarray, "batch tiles"], error: Exception) -> None:
        """Raise for the sample of a failed batch that Pillow rejects too: DALI does not say which one it was.

        If there is none the data is not to blame, and the caller's error stands.
        """
        ids = np.unique(sources // self._spec.tiles).tolist()
        for sample_id in ids:
            try:
                self._reader.tiles(sample_id)
            except BadRecordError as found:
                raise found from error
        error.add_note(f"while DALI filled the batch with {self._reader.location(ids[0])}")
