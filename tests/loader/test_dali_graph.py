"""The DALI graph for a GPU, checked without one: the same operators as on the CPU, each registered where it has to run.

DALI accepts operators without a GPU implementation until it builds the pipeline, which needs a GPU; hence the own check
against its registries. What cannot be checked here are the numbers that GPU kernels compute (tests/gpu).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from pairclip_fast.config import AugmentConfig
from pairclip_fast.data.loader import make_loader
from pairclip_fast.data.parameters import Column, identity_table
from pairclip_fast.errors import EnvironmentLackingError

dali = pytest.importorskip("pairclip_fast.data.backends.dali_graph")

ALL = AugmentConfig(rotate_degrees=10.0, brightness=0.2, contrast=0.2, saturation=0.2, flip_probability=0.5, shift_pixels=2)
GEOMETRY = {"WarpAffine": 2, "CropMirrorNormalize": 2, "_TensorSubscript": 2, "Cat": 1}
COLOUR = {"CoordTransform": 2, "_ArithmeticGenericOp": 2}
CASES = {
    "everything": (ALL, {**GEOMETRY, **COLOUR, "ExternalSource": 9}),
    "flip and shift": (
        AugmentConfig(flip_probability=0.5, shift_pixels=3),
        {"Slice": 2, "CropMirrorNormalize": 2, "_TensorSubscript": 2, "Cat": 1, "ExternalSource": 5},
    ),
    "brightness": (
        AugmentConfig(brightness=0.5),
        {**COLOUR, "CropMirrorNormalize": 2, "_TensorSubscript": 2, "Cat": 1, "ExternalSource": 5},
    ),
    "nothing": (AugmentConfig(), {"CropMirrorNormalize": 2, "_TensorSubscript": 2, "Cat": 1, "ExternalSource": 1}),
    "mirrored border and cutout": (
        AugmentConfig(shift_pixels=3, border="reflect", cutout_size=8),
        # Per tile and axis one flip, two slices and one Cat make the mirrored pixels.
        {"Flip": 4, "Slice": 2, "CropMirrorNormalize": 2, "Erase": 2, "_TensorSubscript": 10, "Cat": 5, "ExternalSource": 7},
    ),
}
MOVES = {"fixed": 1, "resampled": 2}
"""Pairing: encoded pictures per row."""


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a protobuf message: numbers, or bytes of strings and sub-messages."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = data[position]
            position += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while position < len(data):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 2: None, 5: 4}[wire_type] or varint()
        yield number, data[position : position + size]
        position += size


def operators(spec: Any, kind: str) -> list[tuple[str, str]]:
    """(name, device) of each operator of the serialised pipeline."""
    pipeline = dali.make_pipeline(spec, kind=kind, device_id=None, batch_size=8, num_threads=2)
    found = []
    for _, message in fields(pipeline.serialize()):
        if not isinstance(message, bytes) or b"\x06device" not in message:
            continue
        parts = list(fields(message))
        (device,) = ([v for _, v in fields(part)] for _, part in parts if isinstance(part, bytes) and part.startswith(b"\n\x06device"))
        found.append((parts[0][1].decode(), device[2].decode()))
    return found


def make_spec(augment: AugmentConfig, encoding: str) -> Any:
    return dali.GraphSpec(encoding=encoding, tiles=2, height=32, width=32, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0), augment=augment)


def check(spec: Any, expected: dict[str, int]) -> None:
    """The same operators on CPU and GPU, all of them registered; on the GPU only parameters and encoded bytes are elsewhere."""
    from nvidia.dali import backend

    cpu, gpu = operators(spec, "cpu"), operators(spec, "gpu")
    assert Counter(name for name, _ in cpu) == Counter(name for name, _ in gpu) == expected
    registered = {"cpu": backend.RegisteredCPUOps(), "gpu": backend.RegisteredGPUOps(), "mixed": backend.RegisteredMixedOps()}
    for name, device in cpu + gpu:
        assert name in registered[device], f"{name} has no {device} implementation"
    assert {device for _, device in cpu} == {"cpu"}
    by_device = {kind: {name for name, device in gpu if device == kind} for kind in registered}
    assert by_device["cpu"] <= {"ExternalSource"}
    assert by_device["mixed"] <= {"decoders__Image"}
    if spec.encoding == "raw":
        assert Counter(device for name, device in gpu if name == "ExternalSource")["gpu"] == 1


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
@pytest.mark.parametrize("case", CASES)
def test_the_gpu_graph_is_the_cpu_graph(case: str, encoding: str) -> None:
    augment, expected = CASES[case]
    if encoding != "raw":
        expected = {**expected, "decoders__Image": 1}
    check(make_spec(augment, encoding), expected)


@pytest.mark.parametrize("pairing", MOVES)
def test_tiles_that_move_are_sliced_where_they_are(pairing: str) -> None:
    augment, pictures = AugmentConfig(pairing=pairing, swap_probability=0.5), MOVES[pairing]  # type: ignore[arg-type]
    nothing = CASES["nothing"][1]
    check(make_spec(augment, "raw"), nothing)
    expected = {**nothing, "Slice": 2, "decoders__Image": pictures, "ExternalSource": 2 + pictures}
    del expected["_TensorSubscript"]
    check(make_spec(augment, "png"), expected)


@pytest.mark.parametrize(
    ("augment", "reach"),
    [
        (AugmentConfig(shift_pixels=3), (0, 0)),
        (AugmentConfig(shift_pixels=3, border="reflect"), (4, 4)),
        (AugmentConfig(rotate_degrees=180.0, border="reflect"), (8, 8)),  # half the diagonal less half the side, and a tap
        (AugmentConfig(rotate_degrees=180.0, shift_pixels=16, border="reflect"), (31, 31)),
        (AugmentConfig(border="reflect"), (0, 0)),
    ],
)
def test_no_more_is_mirrored_than_can_be_seen(augment: AugmentConfig, reach: tuple[int, int]) -> None:
    assert make_spec(augment, "raw").reach == reach


def test_the_check_would_notice_an_operator_without_gpu_implementation() -> None:
    from nvidia.dali import backend

    assert "PeekImageShape" in backend.RegisteredCPUOps()
    assert "PeekImageShape" not in backend.RegisteredGPUOps()


def test_source_matrix_in_corner_coordinates() -> None:
    table = identity_table(3, tiles=1)[:, 0]
    table[0, Column.SHIFT_X], table[0, Column.SHIFT_Y] = 3.0, -2.0
    table[1, Column.ANGLE] = 90.0
    table[2, [Column.ANGLE, Column.SHIFT_X]] = 30.0, 5.0
    shifted, turned, both = dali.source_matrix(table, height=32, width=16).astype(np.float64)
    assert np.allclose(shifted, [[1, 0, -3], [0, 1, 2]])
    # The destination's top (3 above the centre) comes from the source's right: counter-clockwise.
    assert np.allclose(turned @ [8.0, 13.0, 1.0], [8.0 + 3.0, 16.0])
    x, y = 2.0 - 8.0 - 5.0, 7.0 - 16.0
    cosine, sine = math.cos(math.pi / 6), math.sin(math.pi / 6)
    assert np.allclose(both @ [2.0, 7.0, 1.0], [cosine * x - sine * y + 8.0, sine * x + cosine * y + 16.0], atol=1e-5)


def test_colour_map_is_the_operations_one_after_the_other() -> None:
    table = identity_table(1, tiles=1)[:, 0]
    table[0, [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION]] = 0.7, 1.6, 0.4
    matrix, offset = dali.colour_map(table)
    pixel = np.array([200.0, 30.0, 90.0])
    grey = pixel @ [0.299, 0.587, 0.114]
    expected = 0.7 * (128.0 + 1.6 * (grey + 0.4 * (pixel - grey) - 128.0))
    assert np.allclose(matrix[0] @ pixel + offset[0], expected, atol=1e-4)


def test_a_missing_gpu_is_said(folders: dict[str, Any], events: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    device = torch.device("cuda", 0)
    with pytest.raises(EnvironmentLackingError, match="no GPU"):
        make_loader(folders["raw"], split="train", batch_size=8, augment=ALL, seed=0, device=device, events=events, backend="dali")
