"""Where commands look for data, and put it, when they are not told. Names only, so that options import nothing heavy."""

from __future__ import annotations

from pathlib import Path

ARCHIVES = (
    "cifar-100-python",
    "cifar-100-python.tar.gz",
    "cifar-100-python.tar",
    "cifar-100-binary",
    "cifar-100-binary.tar.gz",
    "cifar-100-binary.tar",
)
"""Names of the published archives and of what they unpack to, in order of preference."""
MANIFEST_NAME = "manifest.json"
"""What makes a folder a data folder."""
USUAL_FOLDER = Path("data")
"""Of data folders, and of CIFAR-100 itself: torchvision's examples put it there."""
OTHER_FOLDER = Path("data-pairs")


def default_folder() -> Path:
    """The data folder of every command that is not given one: `data`, or `data-pairs` if CIFAR-100 lies in `data`.

    A `data` with a manifest is a data folder, whatever else lies in it.
    """
    occupied = any((USUAL_FOLDER / name).exists() for name in ARCHIVES) and not (USUAL_FOLDER / MANIFEST_NAME).exists()
    return OTHER_FOLDER if occupied else USUAL_FOLDER
