"""Reads the pickles of the CIFAR-100 archive without running anything.

A pickle is a program. Ours is run by an unpickler that knows no class of anybody's, not even numpy's: it maps the five
names that the published files use to inert stand-ins that only remember what they were given. The array is then made
from the remembered bytes, after its type and shape were checked.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from pairclip_fast.errors import DataError

PICKLE_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
    OverflowError,
    MemoryError,
    RecursionError,
    struct.error,
)
PLACING = ("PUT", "BINPUT", "LONG_BINPUT")
"""Operations that keep an object in a place of their choice."""


class RememberedDtype:
    """Stands in for numpy.dtype: remembers its name."""

    def __init__(self, name: object = None, *_: object) -> None:
        self.name = name.decode("latin-1") if isinstance(name, bytes) else name

    def __setstate__(self, state: object) -> None:
        del state  # byte order and alignment, of no meaning for single bytes


class RememberedArray:
    """Stands in for numpy.ndarray: remembers its state."""

    def __init__(self, *_: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def rows(self, width: int, *, where: str) -> npt.NDArray[np.uint8]:
        """The remembered bytes as uint8 [n, width].

        Raises:
            DataError: they are not such an array.
        """
        state = self.state if isinstance(self.state, tuple) and len(self.state) == 5 else (None,) * 5
        _, shape, dtype, fortran_order, data = state
        data = data.encode("latin-1") if isinstance(data, str) else data
        sides = shape if isinstance(shape, tuple) and all(type(side) is int and 0 <= side < 2**31 for side in shape) else None
        good = (
            isinstance(dtype, RememberedDtype)
            and dtype.name in ("u1", "|u1", "uint8")
            and not fortran_order
            and isinstance(data, bytes)
            and sides is not None
            and len(sides) == 2
            and sides[1] == width
            and math.prod(sides) == len(data)
        )
        if not good:  # what is no shape is not shown: tuples within tuples would take for ever to write out
            raise DataError("the batch's `data` is no array of images", where=where, expected=f"uint8 [n, {width:,}]", got=sides)
        assert isinstance(data, bytes)
        return np.frombuffer(data, dtype=np.uint8).reshape(-1, width)


def _reconstruct(*_: object) -> RememberedArray:
    """Stands in for numpy's function of that name, which would allocate whatever it is told."""
    return RememberedArray()


def _encode(text: object, *_: object) -> bytes:
    """Stands in for _codecs.encode, by which Python 3 writes bytes into old pickles."""
    if not isinstance(text, str):
        raise pickle.UnpicklingError("bytes are not made from text")
    return text.encode("latin-1")


class _Unpickler(pickle.Unpickler):
    """Knows five names, and what they mean here is ours."""

    KNOWN: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
        ("numpy", "ndarray"): RememberedArray,
        ("numpy", "dtype"): RememberedDtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str, /) -> Any:
        try:
            return self.KNOWN[(module, name)]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no CIFAR-100 file does") from None

    def persistent_load(self, pid: object, /) -> Any:
        del pid
        raise pickle.UnpicklingError("it refers to an object outside of the file")


def load_pickle(data: bytes, *, where: object) -> Any:
    """The dicts, lists, texts, numbers and (remembered) arrays of a pickle.

    Raises:
        DataError: it is damaged, or refers to anything else.
    """
    try:
        _refuse_far_places(data)
        return _Unpickler(io.BytesIO(data), encoding="bytes").load()
    except PICKLE_ERRORS as error:
        raise DataError("the batch file is damaged or hostile", where=where, got=error) from error


def _refuse_far_places(data: bytes) -> None:
    """A pickle keeps its objects in numbered places, one after the other. Python makes a table as long as any number says, of 64 GB
    for four damaged bytes, and the system then kills the process."""
    for number, (opcode, place, _position) in enumerate(pickletools.genops(data)):
        if opcode.name in PLACING and isinstance(place, int) and place > number:
            raise pickle.UnpicklingError(f"it keeps an object in place {place:,}, of {number:,} at most")
