"""Where images come from: one module per kind of source, one function that opens any of them.

A source is read whole into memory (CIFAR-100: 180 MB), because it is read once, at shard time, and everything after it
works on indices. None of these modules imports torch; pyarrow and Pillow load with the kind that needs them.
"""

from __future__ import annotations

from pathlib import Path

from pairclip_fast.data.sources.auto import Location, locate
from pairclip_fast.data.sources.base import TILE_SIZE, ImageSet, Sources, printable_name, same_classes
from pairclip_fast.errors import ConfigError, EnvironmentLackingError, StorageError
from pairclip_fast.events import EventLog

__all__ = ["ImageSet", "Location", "Sources", "locate", "open_source"]


def open_source(
    kind: str,
    *,
    path: Path | None,
    test_path: Path | None,
    seed: int,
    on_bad: str,
    events: EventLog,
    tile_size: int = TILE_SIZE,
    num_images: int | None = None,
    fallback: bool = False,
) -> Sources:
    """Decode all images of a source.

    Args:
        kind: cifar100, parquet, imagefolder or shapes, as `locate` says.
        path: File or folder; None for shapes, or to download CIFAR-100.
        test_path: File or folder of the test part; same kind, same class names.
        seed: Seed of generated images.
        on_bad: `raise` at the first bad image, or `skip` up to 0.1 % of them.
        events: For progress, notes and fallbacks.
        tile_size: Side of the square that every image is resized to.
        num_images: Training images to generate (shapes only; default 12,000, with 2,000 for test).
        fallback: If CIFAR-100 cannot be downloaded, generate shapes instead of failing.

    Raises:
        ConfigError: paths that do not go with the kind.
        DataError: the source is missing, damaged, empty, or its parts do not fit together.
        EnvironmentLackingError: CIFAR-100 has to be downloaded and cannot be.
    """
    if kind == "shapes":
        return _shapes(seed=seed, tile_size=tile_size, num_images=num_images, events=events, reason=None)
    if kind == "cifar100":
        if path is not None:
            return _cifar100(path, tile_size=tile_size, on_bad=on_bad, events=events)
        from pairclip_fast.data.sources.download import fetch_cifar100

        try:
            path = fetch_cifar100(events=events)
        except (EnvironmentLackingError, StorageError) as error:
            if not fallback:
                raise
            reason = f"no CIFAR-100 on this machine, and its download failed: {error.args[0].splitlines()[0]}"
            events.fallback("source images", chosen="generated shapes", reason=reason)
            return _shapes(seed=seed, tile_size=tile_size, num_images=num_images, events=events, reason=reason)
        return _cifar100(path, tile_size=tile_size, on_bad=on_bad, events=events)
    if path is None:
        raise ConfigError(f"--source {kind} needs --path", where="--path")
    if kind == "parquet":
        return _parquet(path, test_path, on_bad=on_bad, tile_size=tile_size, events=events)
    if kind == "imagefolder":
        return _imagefolder(path, test_path, on_bad=on_bad, tile_size=tile_size, events=events)
    raise ConfigError("unknown source", where="--source", expected="cifar100, parquet, imagefolder or shapes", got=kind)


def _shapes(*, seed: int, tile_size: int, num_images: int | None, events: EventLog, reason: str | None) -> Sources:
    from pairclip_fast.data.sources import shapes

    count = shapes.TRAIN_IMAGES if num_images is None else num_images
    test_count = max(count * shapes.TEST_IMAGES // shapes.TRAIN_IMAGES, 1)
    parts = [
        shapes.read_shapes(part, num_images=images, seed=seed, size=tile_size, events=events)
        for part, images in (("train", count), ("test", test_count))
    ]
    return Sources(train=parts[0], test=parts[1], description="generated shapes", fallback_reason=reason)


def _cifar100(path: Path, *, tile_size: int, on_bad: str, events: EventLog) -> Sources:
    from pairclip_fast.data.sources.cifar100 import read_cifar100

    train, test = read_cifar100(path, size=tile_size, on_bad=on_bad, events=events)
    return Sources(train=train, test=test, description=f"CIFAR-100 archive {printable_name(path.name)}")


def _parquet(path: Path, test_path: Path | None, *, on_bad: str, tile_size: int, events: EventLog) -> Sources:
    from pairclip_fast.data.sources.parquet import parquet_parts, parquet_test_files, read_parquet

    files, test_files = parquet_parts(path)
    test_files = parquet_test_files(test_path) if test_path is not None else test_files
    train = read_parquet(files, on_bad=on_bad, size=tile_size, events=events)
    test = read_parquet(test_files, on_bad=on_bad, size=tile_size, events=events, every_class=False) if test_files else None
    return _together(train, test, description=f"parquet {printable_name(path.name)}", test_path=test_path)


def _imagefolder(path: Path, test_path: Path | None, *, on_bad: str, tile_size: int, events: EventLog) -> Sources:
    from pairclip_fast.data.sources.imagefolder import folder_parts, read_imagefolder

    folder, test_folder = folder_parts(path)
    test_folder = test_path or test_folder
    train = read_imagefolder(folder, on_bad=on_bad, size=tile_size, events=events)
    test = read_imagefolder(test_folder, on_bad=on_bad, size=tile_size, events=events) if test_folder else None
    return _together(train, test, description=f"image folder {printable_name(path.name)}", test_path=test_path)


def _together(train: ImageSet, test: ImageSet | None, *, description: str, test_path: Path | None) -> Sources:
    if test is not None:
        same_classes(train.class_names, test.class_names, where=test_path or "test part")
    if test_path is not None:
        description += f", test {printable_name(test_path.name)}"
    return Sources(train=train, test=test, description=description)
