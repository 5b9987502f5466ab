"""What `shard` is asked to do: one frozen value, checked when it is made. Imports nothing heavy, so usage errors are instant."""

from __future__ import annotations

import dataclasses
import string
from pathlib import Path
from typing import Literal

from pairclip_fast.config import require
from pairclip_fast.data.places import default_folder
from pairclip_fast.errors import ConfigError

DEFAULT_TEMPLATE = "the photo on the left is {left} and the photo on the right is {right}"
DEFAULT_SHARD_SIZE = 5_000
"""Pairs per tar: 43 MB raw, so that 50,000 pairs make ten shards, enough to spread over processes and cheap to re-check."""
SourceKind = Literal["auto", "cifar100", "parquet", "imagefolder", "shapes"]
Encoding = Literal["raw", "png", "jpeg"]
OnBad = Literal["raise", "skip"]


def check_template(template: str) -> None:
    """Admit printable text on one line with the fields {left} and {right} and nothing else.

    A template is data, but `str.format` would evaluate attribute look-ups in it; so fields are named here, one by one.

    Raises:
        ConfigError: unbalanced braces, another field, a conversion or format spec, no field at all, or characters that are no text.
    """
    require(template.isprintable(), "--template", "printable characters on one line", template)
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError("the caption template is malformed", where="--template", got=error) from error
    fields = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    for name, spec, conversion in fields:
        require(name in ("left", "right") and not spec and not conversion, "--template", "only the fields {left} and {right}", template)
    require(bool(fields), "--template", "at least one of {left} and {right}", template)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ShardOptions:
    """Make a data folder: split the images, pair them, and write shards that webdataset, DALI and open_clip read."""

    source: SourceKind = "auto"
    """Where the images come from; `auto`: --path, else a local CIFAR-100, else its download, else generated shapes."""
    path: Path | None = None
    """File or folder with the source images."""
    test_path: Path | None = None
    """File or folder with further images of the same classes, for a test split."""
    out: Path = dataclasses.field(default_factory=default_folder)
    """Folder to write; data-pairs is the default where CIFAR-100 itself lies in data."""
    num_pairs: int | None = None
    """Training pairs (default: as many as training images)."""
    val_fraction: float = 0.1
    """Share of the images held out for validation, the same in every class."""
    different_class_prob: float = 0.5
    """Probability that the right image is drawn from another class than the left; else it is drawn from all classes.
    With 100 classes, 0.5 changes the share of same-class pairs from 1 % to 0.5 %."""
    template: str = DEFAULT_TEMPLATE
    """Caption text with the fields {left} and {right}."""
    encoding: Encoding = "raw"
    """`raw`: uint8 tiles as they are; `png`: lossless picture of the pair; `jpeg`: lossy, quality 95, no chroma subsampling."""
    shard_size: int = DEFAULT_SHARD_SIZE
    """Pairs per shard."""
    seed: int = 0
    """Seed of the split, the pairing and the generated shapes."""
    on_bad: OnBad = "raise"
    """What a bad image does: stop with its name, or be left out and counted (at most 0.1 % of the images)."""
    overwrite: bool = False
    """Replace an existing data folder once the new one is whole."""
    dry_run: bool = False
    """Print the plan and touch nothing."""
    json: bool = False
    """Print the summary as JSON."""

    def __post_init__(self) -> None:
        require(self.num_pairs is None or self.num_pairs >= 1, "--num-pairs", "1 or more", self.num_pairs)
        require(0.0 < self.val_fraction < 1.0, "--val-fraction", "between 0 and 1", self.val_fraction)
        require(0.0 <= self.different_class_prob <= 1.0, "--different-class-prob", "in [0, 1]", self.different_class_prob)
        require(1 <= self.shard_size <= 1_000_000, "--shard-size", "in 1..1,000,000", self.shard_size)
        require(0 <= self.seed < 2**63, "--seed", "in 0..2**63-1", self.seed)
        require(self.test_path is None or self.path is not None, "--test-path", "--path as well", self.test_path)
        check_template(self.template)
