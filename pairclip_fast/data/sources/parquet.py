"""Images in parquet files, as the Hugging Face hub stores them. The only importer of pyarrow.

Layout: an image column `img` or `image` (a struct of bytes and path, or plain binary), a label column `fine_label` or
`label`, and the class names in the schema metadata, key `huggingface`. In a folder, files called test* are the test part.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pairclip_fast.data.sources.base import ImageSet, check_labels, display_names, printable_name
from pairclip_fast.data.sources.decode import ImageCollector
from pairclip_fast.errors import DataError
from pairclip_fast.events import EventLog

IMAGE_COLUMNS = ("img", "image")
LABEL_COLUMNS = ("fine_label", "label")
BATCH_ROWS = 1_024


def parquet_parts(path: Path) -> tuple[list[Path], list[Path]]:
    """The train and the test files of a file or folder, sorted by name.

    Raises:
        DataError: no parquet file there, or files of which it is unclear what part they are.
    """
    if path.is_file():
        return [path], []
    files = sorted(file for file in path.glob("*.parquet") if file.is_file())
    test = [file for file in files if file.name.startswith("test")]
    train = [file for file in files if file not in test]
    named = [file for file in train if file.name.startswith("train")]
    if named and len(named) < len(train):
        other = next(file.name for file in train if file not in named)
        raise DataError("the folder mixes train files with others", where=path, got=other, fix="name the files to use with --path FILE")
    if not train:
        raise DataError("no parquet files with training images", where=path, expected="*.parquet", got=[file.name for file in test] or None)
    return train, test


def parquet_test_files(path: Path) -> list[Path]:
    """The files of a part that was named as test: those called test*, if any, else all.

    Raises:
        DataError: there are none.
    """
    files = [path] if path.is_file() else sorted(path.glob("*.parquet"))
    if not files:
        raise DataError("no parquet files with test images", where=path, expected="*.parquet")
    return [file for file in files if file.name.startswith("test")] or files


def read_parquet(files: list[Path], *, on_bad: str, size: int, events: EventLog, every_class: bool = True) -> ImageSet:
    """Decode the images of one part.

    Args:
        files: The parquet files, in order.
        on_bad: `raise` or `skip`.
        size: Side of a tile.
        events: For progress and notes.
        every_class: Whether each class must occur.

    Raises:
        DataError: not parquet, columns or class names missing, labels bad, or images bad beyond the policy.
    """
    where = files[0] if len(files) == 1 else files[0].parent
    with contextlib.ExitStack() as stack:
        opened = []
        for file in files:
            with _arrow_errors(file):
                handle = stack.enter_context(file.open("rb"))  # pyarrow itself opens no name that is not UTF-8
                opened.append(stack.enter_context(pq.ParquetFile(handle)))
        columns = [_columns(file.schema_arrow, where=path) for file, path in zip(opened, files, strict=True)]
        names = columns[0][2]
        for (_, _, other), path in zip(columns[1:], files[1:], strict=True):
            if other != names:
                raise DataError("parquet files of one folder have different class names", where=path, expected=names[:5], got=other[:5])
        collector = ImageCollector(where=where, on_bad=on_bad, size=size, events=events)
        labels: list[int] = []
        ids: list[str] = []
        total = sum(file.metadata.num_rows for file in opened)
        with events.progress("reading images", total, unit="images") as advance:
            for file, path, (image_column, label_column, _) in zip(opened, files, columns, strict=True):
                for row, (image, label) in enumerate(_rows(file, image_column, label_column, where=path)):
                    name = f"{printable_name(path.name)}#{row}"
                    if label is None:
                        raise DataError("a label is missing", where=f"{path}: row {row}", expected=f"0..{len(names) - 1}")
                    if collector.add(image, name=name):
                        labels.append(label)
                        ids.append(name)
                    if collector.seen % BATCH_ROWS == 0:
                        advance(BATCH_ROWS)
        images = collector.finish()
    result = ImageSet(
        images=images,
        labels=np.array(labels, dtype=np.int64),
        class_names=display_names(names, where=where),
        source="parquet",
        ids=tuple(ids),
        skipped=tuple(collector.skipped),
    )
    return check_labels(result, where=where, every_class=every_class)


@contextlib.contextmanager
def _arrow_errors(path: Path) -> Iterator[None]:
    """pyarrow's many ways of saying that a file is damaged, as ours."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise DataError("cannot read the parquet file", where=path, got=str(error).splitlines()[0] if str(error) else error) from error


def _rows(file: Any, image_column: str, label_column: str, *, where: Path) -> Iterator[tuple[bytes | None, int | None]]:
    """(image bytes, label) of each row."""
    with _arrow_errors(where):
        for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=[image_column, label_column]):
            images = batch.column(image_column)
            if pa.types.is_struct(images.type):
                images = images.field("bytes")
            yield from zip(images.to_pylist(), batch.column(label_column).to_pylist(), strict=True)


def _columns(schema: Any, *, where: Path) -> tuple[str, str, list[str]]:
    """Names of the image and label columns, and the class names."""
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        expected = f"one of {', '.join(IMAGE_COLUMNS)} and one of {', '.join(LABEL_COLUMNS)}"
        raise DataError("the parquet file lacks a column", where=where, expected=expected, got=", ".join(schema.names))
    kind = schema.field(image).type
    if pa.types.is_struct(kind):
        kind = kind.field("bytes").type if kind.get_field_index("bytes") >= 0 else None
    if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        got = schema.field(image).type
        raise DataError(
            "the image column does not hold image bytes", where=f"{where}: {image}", expected="struct<bytes, path> or binary", got=got
        )
    if not pa.types.is_integer(schema.field(label).type):
        raise DataError("the label column does not hold class numbers", where=f"{where}: {label}", got=schema.field(label).type)
    return image, label, _class_names(schema, label, where=where)


def _class_names(schema: Any, label: str, *, where: Path) -> list[str]:
    """`info.features.<label>.names` of the `huggingface` metadata: a list, or in old files a table from number to name."""
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"][label]["names"]
        if isinstance(names, dict):
            names = [names[str(number)] for number in range(len(names))]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise TypeError(f"names is {type(names).__name__}")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        expected = f"the schema metadata `huggingface` with info.features.{label}.names"
        raise DataError("the parquet file does not name its classes", where=where, expected=expected, got=repr(error)) from error
    return names
