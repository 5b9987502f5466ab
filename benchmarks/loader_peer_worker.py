"""Loaders that have a format or a pipeline of their own, in an environment of theirs: grain, litdata, MosaicML streaming, SPDL, ffcv.

`rows_of_environment` starts this file with that environment's Python; there it needs numpy and torch and nothing of ours. It
reads the raw records through their record index, writes them in each peer's own format (what that took stands in the row), and
measures two rungs: `read` (uint8 batches) and `normalise` (float32 planes). None of them rotates, so none has a `full` row.
"""

from __future__ import annotations

import importlib
import json
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pairclip_fast.events import EventLog

Record = dict[str, Any]
Batches = Iterator[Any]
HEADER = struct.Struct("<8sIIQ32sII")
RECORD_FIELDS = [("offset", "<u8"), ("size", "<u4"), ("crc32", "<u4"), ("caption_id", "<u4")]
SAMPLE = (2, 32, 32, 3)
SECONDS, REPEATS = 1.0, 3
WARM_UP_BATCHES = 4
SPDL_CHUNK = 64
"""Records per task of an SPDL pipeline: one alone would be mostly overhead."""


def rows_of_environment(python: Path, folder: Path, *, rungs: list[str], batch_size: int, events: EventLog) -> list[Record]:
    """The rows that another environment's Python measures on the train split of `folder`."""
    command = [str(python), __file__, str(folder / "train"), str(batch_size), *(rung for rung in rungs if rung != "full")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        events.say(f"{python}: the peers ended with exit code {done.returncode}")
    rows = []
    for line in done.stdout.splitlines():
        row = json.loads(line)
        if "problem" in row:
            events.say(f"{row['loader']}: {row['problem']}")
        else:
            rows.append(row)
    return rows


def read_pixels(train: Path) -> Any:
    """All raw records, uint8 [n, 2, 32, 32, 3]."""
    import numpy as np

    parts = []
    for tar in sorted(train.glob("*.tar")):
        index = np.frombuffer(tar.with_suffix(".records").read_bytes()[HEADER.size :], dtype=RECORD_FIELDS)
        data = np.fromfile(tar, dtype=np.uint8)
        parts += [data[start : start + size] for start, size in zip(index["offset"].tolist(), index["size"].tolist(), strict=True)]
    return np.stack(parts).reshape(-1, *SAMPLE)


def normalised(batch: Any) -> Any:
    """uint8 tiles [b, 2, 32, 32, 3] to float32 [b, 3, 32, 64]."""
    import torch

    tiles = torch.as_tensor(batch)
    return (tiles.permute(0, 4, 2, 1, 3).reshape(len(tiles), 3, 32, 64).float() - 128.0) / 64.0


def grain_batches(pixels: Any, folder: Path, batch_size: int) -> Batches:
    """grain over an in-memory source, with its own threads."""
    grain = importlib.import_module("grain")
    del folder
    data = grain.MapDataset.source(list(pixels)).shuffle(seed=0).repeat().batch(batch_size, drop_remainder=True).to_iter_dataset()
    return iter(data)


def litdata_batches(pixels: Any, folder: Path, batch_size: int) -> Batches:
    """litdata's chunks and its own data loader, without worker processes (they were slower)."""
    litdata = importlib.import_module("litdata")
    streaming = importlib.import_module("litdata.streaming")
    writer = streaming.Cache(str(folder), chunk_bytes="16MB")
    for index, sample in enumerate(pixels):
        writer[index] = {"pixels": sample.tobytes()}
    writer.done()
    writer.merge()
    torch, numpy = importlib.import_module("torch"), importlib.import_module("numpy")

    def collate(samples: list[dict[str, bytes]]) -> Any:
        return torch.from_numpy(numpy.frombuffer(b"".join(s["pixels"] for s in samples), dtype=numpy.uint8).reshape(-1, *SAMPLE).copy())

    data = litdata.StreamingDataset(str(folder), shuffle=True, drop_last=True)
    while True:
        yield from litdata.StreamingDataLoader(data, batch_size=batch_size, collate_fn=collate, drop_last=True)


def streaming_batches(pixels: Any, folder: Path, batch_size: int) -> Batches:
    """MosaicML streaming: MDS shards, and torch's DataLoader without worker processes."""
    streaming = importlib.import_module("streaming")
    torch, numpy = importlib.import_module("torch"), importlib.import_module("numpy")
    with streaming.MDSWriter(out=str(folder), columns={"pixels": "bytes"}) as writer:
        for sample in pixels:
            writer.write({"pixels": sample.tobytes()})

    def collate(samples: list[dict[str, bytes]]) -> Any:
        return torch.from_numpy(numpy.frombuffer(b"".join(s["pixels"] for s in samples), dtype=numpy.uint8).reshape(-1, *SAMPLE).copy())

    data = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=batch_size)
    while True:
        yield from torch.utils.data.DataLoader(data, batch_size=batch_size, collate_fn=collate, drop_last=True)


def spdl_batches(pixels: Any, folder: Path, batch_size: int) -> Batches:
    """SPDL's pipeline: two threads gather chunks of records, then they are put together."""
    numpy, pipeline = importlib.import_module("numpy"), importlib.import_module("spdl.pipeline")
    del folder
    random = numpy.random.default_rng(0)
    chunk = min(SPDL_CHUNK, batch_size)

    def chunks() -> Iterator[Any]:
        while True:
            order = random.permutation(len(pixels))
            for start in range(0, len(order) - batch_size + 1, chunk):
                yield order[start : start + chunk]

    builder = pipeline.PipelineBuilder().add_source(chunks()).pipe(lambda ids: pixels[ids], concurrency=2)
    built = builder.aggregate(batch_size // chunk).pipe(numpy.concatenate).add_sink(2).build(num_threads=2)
    with built.auto_stop():
        yield from built


def ffcv_batches(pixels: Any, folder: Path, batch_size: int) -> Batches:
    """ffcv: its file of arrays, two threads, copied to tensors."""
    writer, loader = importlib.import_module("ffcv.writer"), importlib.import_module("ffcv.loader")
    fields, decoders = importlib.import_module("ffcv.fields"), importlib.import_module("ffcv.fields.decoders")
    transforms, numpy = importlib.import_module("ffcv.transforms"), importlib.import_module("numpy")
    path = str(folder / "pixels.beton")
    array = fields.NDArrayField(dtype=numpy.dtype("uint8"), shape=SAMPLE)
    writer.DatasetWriter(path, {"pixels": array}, num_workers=1).from_indexed_dataset([(sample,) for sample in pixels])
    order = loader.OrderOption.RANDOM
    pipelines = {"pixels": [decoders.NDArrayDecoder(), transforms.ToTensor()]}
    batches = loader.Loader(path, batch_size=batch_size, num_workers=2, order=order, drop_last=True, pipelines=pipelines)
    while True:
        for (batch,) in batches:
            yield batch


PEERS: dict[str, tuple[str, Callable[[Any, Path, int], Batches]]] = {
    "grain": ("grain", grain_batches),
    "litdata": ("litdata", litdata_batches),
    "MosaicML streaming": ("streaming", streaming_batches),
    "SPDL": ("spdl", spdl_batches),
    "ffcv": ("ffcv", ffcv_batches),
}


def measure(name: str, make: Callable[[Any, Path, int], Batches], pixels: Any, rung: str, batch_size: int) -> Record:
    """One row: the median of a few turns. Raises ValueError if the batches are not the pixels."""
    with tempfile.TemporaryDirectory(prefix="pairclip-peer-") as folder:
        opened = time.perf_counter()
        batches = make(pixels, Path(folder), batch_size)
        first = next(batches)
        first_s = time.perf_counter() - opened
        known = {sample.tobytes() for sample in pixels}
        strangers = sum(bytes(memoryview(sample.numpy() if hasattr(sample, "numpy") else sample)) not in known for sample in first)
        if strangers or len(first) != batch_size:
            raise ValueError(f"{strangers} of {len(first)} samples of a batch are not in the data")
        turns = []
        for _ in range(REPEATS):
            for _ in range(WARM_UP_BATCHES):
                next(batches)
            pairs, cpu, started = 0, time.process_time(), time.perf_counter()
            while time.perf_counter() - started < SECONDS:
                batch = next(batches)
                batch = normalised(batch) if rung == "normalise" else batch
                values = batch.numpy() if hasattr(batch, "numpy") else batch  # one thread: torch's others would spin, and be counted
                values.reshape(len(values), -1)[:, ::16].sum()
                pairs += len(batch)
            turns.append(((time.perf_counter() - started) / pairs, (time.process_time() - cpu) / pairs))
        close = getattr(batches, "close", None)
        if close is not None:
            close()
    wall, cpu_times = (sorted(values) for values in zip(*turns, strict=True))
    rates = sorted(1.0 / seconds for seconds in wall)
    row: Record = {"rung": rung, "loader": name, "encoding": "own format", "threads": 2, "pairs_per_second": rates[1]}
    row |= {"pairs_per_second_low": rates[0], "pairs_per_second_high": rates[-1], "cpu_us_per_pair": 1e6 * cpu_times[1]}
    row |= {
        "loader_us_per_pair": 1e6 * cpu_times[1],
        "cpu_us_per_pair_low": 1e6 * cpu_times[0],
        "cpu_us_per_pair_high": 1e6 * cpu_times[-1],
        "epoch_s": 50_000 / rates[1],
    }
    return row | {"first_batch_ms": 1e3 * first_s, "same_pictures": True}


def main(words: list[str]) -> int:
    """Measure every peer of this environment; one JSON object per line."""
    train, batch_size, rungs = Path(words[0]), int(words[1]), words[2:]
    pixels = read_pixels(train)
    for name, (module, make) in PEERS.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            print(json.dumps({"loader": name, "problem": f"not installed ({error})"}), flush=True)
            continue
        for rung in rungs:
            try:
                row = measure(name, make, pixels, rung, batch_size)
            except Exception as error:  # noqa: BLE001 - a peer that fails is a row that says so
                row = {"loader": name, "problem": f"{rung} failed: {type(error).__name__}: {error}"}
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
