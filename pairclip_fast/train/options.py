"""What `train` and `eval` can be told, and how flags, a config file and a preset become one configuration.

A flag that is None keeps what the config file says, which in turn keeps what the preset says. Nothing here imports torch:
a typo in a flag or a key is answered at once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Container
from pathlib import Path
from typing import Any, Literal

from pairclip_fast.config import DEFAULT_PRESET, RunConfig, load_preset, overlay, read_toml
from pairclip_fast.errors import ConfigError

DEFAULT_RUNS = Path("runs")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainOptions:
    """Train a preset on a data folder; a flag that is not given keeps what the preset or the config file says."""

    data: Path | None = None
    """Data folder (default: the one that the resumed run was trained on, else where `shard` puts it: data, or data-pairs)."""
    out: Path | None = None
    """Run folder (default: runs/<preset>-<time>; with --resume the newest run)."""
    preset: str | None = None
    """Preset to start from (default: vit)."""
    amp: bool = False
    """Mixed precision (bfloat16 or float16 beside float32) where this device is faster with it."""
    epochs: int | None = None
    """Passes over the training pairs."""
    batch_size: int | None = None
    """Pairs per optimizer step, over all processes."""
    lr: float | None = None
    """Peak learning rate (with muon: of the parameters that AdamW trains)."""
    loader: Literal["auto", "native", "dali", "reference"] | None = None
    """Which loader feeds the training."""
    on_bad_record: Literal["raise", "skip", "substitute"] | None = None
    """A record that has changed on disk or cannot be decoded: stop (default), leave its rows out, or take the next good sample."""
    loss: Literal["bank", "infonce"] | None = None
    """Softmax over all captions, or symmetric InfoNCE within the batch."""
    bank: Literal["raw", "whiten"] | None = None
    """The text encoder's features as they are, or whitened."""
    compile: Literal["auto", "on", "off"] | None = None
    """torch.compile: on CUDA only, everywhere, or nowhere."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to train."""
    memory_budget: str | None = None
    """Stay below this much memory (6GiB, 900MiB) in each process, with smaller micro-batches and recomputing; on a GPU of its memory."""
    seed: int | None = None
    """Seed of weights, order and augmentation."""
    resume: bool = False
    """Continue the run in --out, or the newest run."""
    config: Path | None = None
    """TOML file with the same tables as a preset, any subset of keys."""
    text_encoder: str | None = None
    """Text encoder of the captions (default: the data folder's, else auto); a bank that another one has made is made anew."""
    dry_run: bool = False
    """Print plan, sizes and time estimate; touch nothing."""
    json: bool = False
    """Print the result as one JSON object."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class EvalOptions:
    """Rank all captions for the held-out pairs of a data folder, with the best weights of a run."""

    run: Path
    """Run folder."""
    data: Path | None = None
    """Data folder with the same class names (default: the one the run was trained on)."""
    split: Literal["val", "test", "train"] = "val"
    """Which pairs to rank."""
    json: bool = False
    """Print one JSON object."""


def resolve_config(options: TrainOptions, *, base: RunConfig | None = None, only: Container[str] | None = None) -> RunConfig:
    """Preset, overlaid with the config file, overlaid with the flags; what comes of all three is checked.

    Two things follow a flag because no other flag could mend them: epochs that the warm-up would fill shrink it in
    proportion, and `--loss infonce` switches label smoothing and mixing off.

    Args:
        options: The flags.
        base: Start from this configuration (a resumed run's) instead of the preset.
        only: Take over these fields (`train.device`) and no others.

    Raises:
        ConfigError: unknown preset or key, wrong type, or values that do not fit together.
    """
    tables = read_toml(options.config) if options.config is not None else {}
    if options.preset is not None:
        tables["preset"] = options.preset
    if base is None:
        where = "--preset" if options.preset is not None or options.config is None else f"{options.config}: preset"
        base = load_preset(str(tables.get("preset", DEFAULT_PRESET)), where=where)
    for name, flags in _flag_tables(options, tables, base).items():
        if isinstance(tables.setdefault(name, {}), dict):  # what is no table is refused below
            tables[name] = tables[name] | flags
    if only is not None:
        named = {name: table for name, table in tables.items() if isinstance(table, dict)}
        tables = {name: {key: value for key, value in table.items() if f"{name}.{key}" in only} for name, table in named.items()}
    return overlay(base, tables, where="the command line" if options.config is None else str(options.config))


def budget_bytes(options: TrainOptions) -> int | None:
    """The memory budget in bytes; None for none.

    Raises:
        ConfigError: it is not a size.
    """
    if options.memory_budget is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)B?", options.memory_budget.strip(), flags=re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        size = "a number and a unit, as 6GiB or 900MiB"
        raise ConfigError("not a size", where="--memory-budget", expected=size, got=options.memory_budget)
    unit = found[2].upper()
    return int(float(found[1]) * (1024 if unit.endswith("I") else 1000) ** ("KMGT".index(unit[0]) + 1))


def _flag_tables(options: TrainOptions, file: dict[str, Any], base: RunConfig) -> dict[str, Any]:
    """The given flags as configuration tables, and what follows them in `base` overlaid with the file's tables."""

    def before(table: str, field: str) -> float:
        """A number as it is without the flags; NaN, which nothing follows, for what will be refused."""
        given, value = file.get(table), getattr(getattr(base, table), field)
        value = given.get(field, value) if isinstance(given, dict) else value
        return value if isinstance(value, int | float) else math.nan

    train = {name: getattr(options, name) for name in ("epochs", "batch_size", "loader", "on_bad_record", "compile", "device", "seed")}
    train = {name: value for name, value in train.items() if value is not None}
    if options.amp:
        train["amp"] = True
    tables: dict[str, Any] = {"train": train, "optimizer": {}, "loss": {}, "bank": {}}
    if options.lr is not None:
        tables["optimizer"] = {"lr": options.lr} | ({"final_lr": options.lr} if before("optimizer", "final_lr") > options.lr else {})
    warmup, epochs = before("optimizer", "warmup_epochs"), before("train", "epochs")
    if options.epochs is not None and 0 < options.epochs <= warmup <= epochs:
        tables["optimizer"]["warmup_epochs"] = warmup * options.epochs / epochs
    if options.loss is not None:
        tables["loss"] = {"kind": options.loss} | ({"label_smoothing": 0.0} if options.loss == "infonce" else {})
        tables["augment"] = {"mix": "none"} if options.loss == "infonce" else {}
    if options.bank is not None:
        tables["bank"] = {"kind": options.bank}
    return {name: table for name, table in tables.items() if table}
