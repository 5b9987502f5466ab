"""What others would use for the same work: DALI's stock operators, webdataset with torchvision, torch on resident pixels.

Each is written as its documentation shows, reads the same shards (or the same pixels), and has random numbers of its own, so
its augmented pictures cannot be compared one by one; shapes, dtypes and the mean and spread of the values are. Peers that
need a format of their own live in another environment: `loader_peer_worker`.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loader_rows import FULL, Stream
from torch import Tensor

from pairclip_fast.data.manifest import Manifest, read_manifest
from pairclip_fast.data.shards import ShardReader
from pairclip_fast.errors import NumericsError
from pairclip_fast.events import EventLog

SHUFFLE_BUFFER = 1_000
MEAN_TOLERANCE, STD_TOLERANCE = 0.35, 0.35
"""Augmentation darkens borders and changes contrast; a wrong scale or a missing mean would be off by far more."""


def peer_streams(folders: dict[str, Path], *, rung: str, threads: int, batch_size: int, events: EventLog) -> Iterator[Stream]:
    """All peers that this environment has and that can do this rung."""
    makers: list[tuple[str, str, Callable[..., tuple[Iterator[Tensor], Callable[[], None]]], tuple[str, ...], tuple[str, ...]]] = [
        ("DALI stock CPU operators", "nvidia.dali", dali_batches, ("raw", "png", "jpeg"), ("read", "normalise", "full")),
        ("webdataset + torchvision v2", "webdataset", webdataset_batches, ("raw", "png"), ("read", "normalise", "full")),
        ("PyTorch DataLoader, as the report", "torchvision", dataloader_batches, ("raw",), ("normalise", "full")),
        ("torch, resident, compiled", "torch", resident_batches, ("raw",), ("normalise", "full")),
    ]
    for name, module, make, encodings, rungs in makers:
        if not _installed(module):
            events.say(f"{name}: not installed")
            continue
        for encoding in encodings if rung in rungs else ():
            if encoding != "raw" and rung != "full":
                continue
            torch.set_num_threads(threads)
            started = time.perf_counter()
            batches, close = make(folders[encoding], encoding=encoding, rung=rung, threads=threads, batch_size=batch_size)
            first = next(batches)
            seconds = time.perf_counter() - started
            check_values(first, name=f"{name}, {rung}", rung=rung, batch_size=batch_size)
            yield Stream(
                name=name,
                encoding=encoding,
                rung=rung,
                threads=threads,
                batches=batches,
                close=close,
                first_batch_s=seconds,
                same_maths=rung != "full",
            )


def check_values(batch: Tensor, *, name: str, rung: str, batch_size: int) -> None:
    """Raise unless a batch looks like what the rung asks for.

    Raises:
        NumericsError: wrong shape or dtype, or values of another scale.
    """
    if rung == "read":
        good = batch.dtype == torch.uint8 and batch.numel() == batch_size * 6144 and float(batch.float().std()) > 20.0
    else:
        good = batch.dtype == torch.float32 and tuple(batch.shape) == (batch_size, 3, 32, 64)
        good = good and abs(float(batch.mean())) < MEAN_TOLERANCE and abs(float(batch.std()) - 1.0) < STD_TOLERANCE
    if not good:
        got = f"{tuple(batch.shape)} {batch.dtype}, mean {float(batch.float().mean()):.3f}, std {float(batch.float().std()):.3f}"
        raise NumericsError("a peer does other work", where=name, got=got)


def dali_batches(folder: Path, *, encoding: str, rung: str, threads: int, batch_size: int) -> tuple[Iterator[Tensor], Callable[[], None]]:
    """DALI's webdataset reader and stock operators on the CPU, uint8 between operators as `color_twist` is meant."""
    import importlib

    dali = importlib.import_module("nvidia.dali")  # by name: one importer in the package, none in its benchmarks
    fn, types = importlib.import_module("nvidia.dali.fn"), importlib.import_module("nvidia.dali.types")
    manifest = read_manifest(folder)
    tars = sorted((folder / "train").glob("*.tar"))

    def around(reach: float) -> Any:
        return fn.random.uniform(range=[1.0 - reach, 1.0 + reach])

    def tile(picture: Any) -> Any:
        angle = fn.random.uniform(range=[-FULL.rotate_degrees, FULL.rotate_degrees])
        turned = fn.rotate(picture, angle=angle, keep_size=True, fill_value=0, interp_type=types.INTERP_LINEAR)
        colours = {"brightness": around(FULL.brightness), "contrast": around(FULL.contrast), "saturation": around(FULL.saturation)}
        return finish(fn.color_twist(turned, **colours), mirror=fn.random.coin_flip())

    def finish(picture: Any, **options: Any) -> Any:
        settings = {"dtype": types.FLOAT, "output_layout": "CHW", "mean": list(manifest.mean), "std": list(manifest.std)}
        return fn.crop_mirror_normalize(picture, **settings, **options)

    pipeline = dali.Pipeline(batch_size=batch_size, num_threads=threads, device_id=None, seed=1, prefetch_queue_depth=2)
    with pipeline:
        payload = fn.readers.webdataset(
            paths=[str(tar) for tar in tars],
            index_paths=[str(tar.with_suffix(".idx")) for tar in tars],
            ext=[manifest.extension],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=SHUFFLE_BUFFER,
            pad_last_batch=True,
            name="reader",
        )
        if encoding == "raw":  # tile-major records: two frames
            frames = fn.reshape(payload, shape=[2, 32, 32, 3], layout="FHWC")
            tiles = [frames[0], frames[1]]
        else:
            picture = fn.decoders.image(payload, device="cpu", output_type=types.RGB)
            tiles = [picture[:, :32], picture[:, 32:]]
        if rung == "read":
            pipeline.set_outputs(frames if encoding == "raw" else picture)
        else:
            pipeline.set_outputs(fn.cat(*[tile(each) if rung == "full" else finish(each) for each in tiles], axis_name="W"))
    pipeline.build()

    def batches() -> Iterator[Tensor]:
        while True:
            (pictures,) = pipeline.run()
            yield torch.utils.dlpack.from_dlpack(pictures.as_tensor())

    return batches(), lambda: None


def torchvision_transform(manifest: Manifest, *, rung: str) -> Callable[[Tensor], Tensor]:
    """A stacked uint8 picture [3, 32, 64] to the rung's tensor, with torchvision's v2 operators on each tile."""
    from torchvision.transforms import v2

    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (manifest.mean, manifest.std))
    tile = v2.Compose(
        [
            v2.RandomRotation(FULL.rotate_degrees, interpolation=v2.InterpolationMode.BILINEAR),
            v2.ColorJitter(FULL.brightness, FULL.contrast, FULL.saturation),
            v2.RandomHorizontalFlip(FULL.flip_probability),
        ]
    )

    def transform(picture: Tensor) -> Tensor:
        if rung == "read":
            return picture
        if rung == "full":
            picture = torch.cat([tile(picture[:, :, :32]), tile(picture[:, :, 32:])], dim=2)
        return (picture.float() - mean) / std

    return transform


def webdataset_batches(
    folder: Path, *, encoding: str, rung: str, threads: int, batch_size: int
) -> tuple[Iterator[Tensor], Callable[[], None]]:
    """webdataset's pipeline in a DataLoader, as many worker processes as threads; tiles are stacked by the decoder."""
    import importlib

    webdataset = importlib.import_module("webdataset")
    from PIL import Image

    manifest = read_manifest(folder)
    transform = torchvision_transform(manifest, rung=rung)

    def sample(members: dict[str, Any]) -> Tensor:
        data = members[manifest.extension]
        if encoding == "raw":
            tiles = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(2, 32, 32, 3)
            picture = torch.cat([tiles[0], tiles[1]], dim=1).permute(2, 0, 1)
        else:
            picture = torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB"))).permute(2, 0, 1)
        json.loads(members["json"])
        return transform(picture)

    tars = [str(tar) for tar in sorted((folder / "train").glob("*.tar"))]
    splitter = webdataset.split_by_worker if len(tars) >= threads else webdataset.shardlists.single_node_only
    data = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False, workersplitter=splitter).shuffle(SHUFFLE_BUFFER).map(sample)
    data = data.repeat().batched(batch_size, collation_fn=torch.stack, partial=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = iter(torch.utils.data.DataLoader(data, batch_size=None, num_workers=threads if len(tars) >= threads else 0))
    return loader, getattr(loader, "_shutdown_workers", lambda: None)


class TilePictures(torch.utils.data.Dataset[Tensor]):
    """The report's dataset: PIL pictures in memory, the tiles of a sample transformed one by one and stacked."""

    def __init__(self, folder: Path, *, rung: str) -> None:
        from PIL import Image
        from torchvision import transforms

        with ShardReader(folder, "train") as reader:
            mean, std = reader.manifest.mean, reader.manifest.std
            self._pictures = [[Image.fromarray(tile) for tile in tiles] for tiles in reader.tiles_of(np.arange(len(reader)))]
        augmentation = [
            transforms.RandomHorizontalFlip(FULL.flip_probability),
            transforms.ColorJitter(FULL.brightness, FULL.contrast, FULL.saturation),
            transforms.RandomRotation(FULL.rotate_degrees, interpolation=transforms.InterpolationMode.BILINEAR),
        ]
        scaled = transforms.Normalize([value / 255 for value in mean], [value / 255 for value in std])
        self._transform = transforms.Compose([transforms.ToTensor(), *(augmentation if rung == "full" else []), scaled])

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Tensor:
        return torch.cat([self._transform(tile) for tile in self._pictures[index]], dim=2)


def dataloader_batches(
    folder: Path, *, encoding: str, rung: str, threads: int, batch_size: int
) -> tuple[Iterator[Tensor], Callable[[], None]]:
    """torch's DataLoader over `TilePictures`, as many worker processes as threads."""
    del encoding
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = torch.utils.data.DataLoader(
            TilePictures(folder, rung=rung),
            batch_size=batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=threads,
            persistent_workers=True,
        )
        endless = itertools.chain.from_iterable(itertools.repeat(loader))
    return endless, lambda: loader._iterator._shutdown_workers() if loader._iterator else None  # type: ignore[attr-defined]


def resident_batches(
    folder: Path, *, encoding: str, rung: str, threads: int, batch_size: int
) -> tuple[Iterator[Tensor], Callable[[], None]]:
    """The whole split as one tensor, gathered and augmented by compiled torch operations."""
    del encoding, threads
    with ShardReader(folder, "train") as reader:
        manifest = reader.manifest
        pixels = torch.from_numpy(reader.tiles_of(np.arange(len(reader))).transpose(0, 1, 4, 2, 3).copy())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (manifest.mean, manifest.std))
    luma = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)

    def augment(tiles: Tensor, angle: Tensor, factors: Tensor, flip: Tensor) -> Tensor:
        picture = tiles.flatten(0, 1).float()
        if rung == "full":
            cosine, sine = torch.cos(angle), torch.sin(angle)
            row = torch.stack([cosine * flip, -sine, torch.zeros_like(sine)], dim=1)
            matrix = torch.stack([row, torch.stack([sine * flip, cosine, torch.zeros_like(sine)], dim=1)], dim=1)
            grid = torch.nn.functional.affine_grid(matrix, list(picture.shape), align_corners=False)
            picture = torch.nn.functional.grid_sample(picture, grid, align_corners=False)
            brightness, contrast, saturation = factors.view(3, -1, 1, 1, 1)
            grey = (picture * luma).sum(1, keepdim=True)
            picture = (brightness * (128.0 + contrast * (grey + saturation * (picture - grey) - 128.0))).clamp(0.0, 255.0)
        picture = picture.view(len(tiles), 2, 3, 32, 32).permute(0, 2, 3, 1, 4).reshape(len(tiles), 3, 32, 64)
        return (picture - mean) / std

    compiled = torch.compile(augment)

    def batches() -> Iterator[Tensor]:
        while True:
            order = torch.randperm(len(pixels))
            for start in range(0, len(order) - batch_size + 1, batch_size):
                count = 2 * batch_size
                angle = torch.deg2rad((torch.rand(count) * 2 - 1) * FULL.rotate_degrees)
                factors = 1.0 + (torch.rand(3, count) * 2 - 1) * FULL.brightness
                flip = torch.randint(0, 2, (count,)) * 2.0 - 1.0
                yield compiled(pixels[order[start : start + batch_size]], angle, factors, flip)

    return batches(), lambda: None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
