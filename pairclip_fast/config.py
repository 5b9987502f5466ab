"""The whole run as one frozen value: dataclasses, presets (TOML), and the rules that tie fields together.

A run is described by a `RunConfig`. It starts as a preset, is overlaid with `--config FILE` (same tables, any subset of
keys) and the flags at once; the result is checked and written to the run folder, from where the run can be repeated.
The line under a field is its documentation and, where it is a flag, its help text. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import tomllib
from collections.abc import Collection, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from pairclip_fast.errors import ConfigError

DEFAULT_PRESET = "vit"
TILES = 2
"""Tiles of a reference-task sample. Rooms below `data.pairs` take the count from the data, not from here."""


def require(condition: bool, field: str, expected: str, got: object) -> None:  # noqa: FBT001  (reads like assert)
    """Raise a `ConfigError` naming `field` unless `condition` holds."""
    if not condition:
        raise ConfigError("invalid configuration", where=field, expected=expected, got=got)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ViTConfig:
    """One transformer over the patches of all tiles together (the report's architecture)."""

    architecture: Literal["vit"] = "vit"
    width: int = 512
    """Token width."""
    depth: int = 6
    """Number of blocks."""
    heads: int = 8
    """Attention heads; must divide the width."""
    mlp_width: int = 2048
    """Hidden width of the MLPs."""
    patch_size: int = 8
    """Side of a square patch, in pixels."""
    pre_norm: bool = True
    """LayerNorm before each sub-layer (Xiong et al. 2020) instead of after it (Vaswani et al. 2017)."""
    activation: Literal["gelu", "relu"] = "gelu"
    """Activation of the MLPs."""

    def __post_init__(self) -> None:
        require(min(self.width, self.depth, self.heads, self.mlp_width, self.patch_size) >= 1, "model", "positive sizes", self)
        require(self.width % self.heads == 0, "model.heads", f"a divisor of model.width ({self.width})", self.heads)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TileViTConfig:
    """A transformer trunk shared by the tiles, each tile encoded alone; a linear head joins them."""

    architecture: Literal["tile_vit"] = "tile_vit"
    width: int = 192
    """Token width."""
    depth: int = 6
    """Number of blocks."""
    heads: int = 3
    """Attention heads; must divide the width."""
    mlp_width: int = 384
    """Hidden width of the MLPs."""
    patch_size: int = 4
    """Side of what becomes one token, in pixels."""
    stem_width: int = 48
    """Channels of the stem's first stage, doubled by each further one; 0 for a plain linear patch embedding."""

    def __post_init__(self) -> None:
        require(min(self.width, self.depth, self.heads, self.mlp_width) >= 1, "model", "positive sizes", self)
        require(self.width % self.heads == 0, "model.heads", f"a divisor of model.width ({self.width})", self.heads)
        require(self.patch_size in (2, 4, 8), "model.patch_size", "2, 4 or 8", self.patch_size)
        require(self.stem_width >= 0, "model.stem_width", "0 or more", self.stem_width)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TileConvConfig:
    """A small convolutional trunk with a whitening stem, shared by the tiles; a linear head joins them."""

    architecture: Literal["tile_conv"] = "tile_conv"
    width: int = 64
    """Channels of the first stage; the two that follow have 4 times as many."""
    residuals: int = 0
    """Convolutions beside a skip connection at the end of each of these two."""
    activation: Literal["gelu", "relu", "silu"] = "silu"
    """Activation after each normalisation."""

    def __post_init__(self) -> None:
        require(self.width >= 1, "model.width", "1 or more", self.width)
        require(self.residuals >= 0, "model.residuals", "0 or more", self.residuals)


LEAST_CONV_TILE = 9
"""Smallest side of a tile for `tile_conv`, in pixels: its stem takes one, three halvings leave one of eight."""
ModelConfig = ViTConfig | TileViTConfig | TileConvConfig
MODEL_CONFIGS: Mapping[str, type[ModelConfig]] = {"vit": ViTConfig, "tile_vit": TileViTConfig, "tile_conv": TileConvConfig}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class BankConfig:
    """The caption bank that the run trains against."""

    kind: Literal["raw", "whiten"] = "whiten"
    """`raw`: the text encoder's features; `whiten`: centred, PCA-whitened to `rank`, L2-normalised again."""
    rank: int = 200
    """Dimensions kept by whitening (at most the rank of the centred bank)."""
    strength: float = 1.0
    """How far whitening goes: directions are divided by their standard deviation to this power; 0 only centres."""
    prompt_ensemble: bool = False
    """Before whitening, reduce every caption to what its two names mean over all their captions; see `text.whiten.name_means`."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, "bank.rank", "1 or more", self.rank)
        require(0 <= self.strength <= 1, "bank.strength", "a number from 0 to 1", self.strength)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What is minimised."""

    kind: Literal["bank", "infonce"] = "bank"
    """`bank`: exact softmax over all captions; `infonce`: symmetric, within the batch, duplicate captions masked."""
    temperature: float = 0.07
    """Initial (or fixed) temperature; logits are cosines divided by it."""
    learn_temperature: bool = True
    """Learn `logit_scale` = ln(1 / temperature), clamped at ln 100."""
    label_smoothing: float = 0.0
    """Share of the target spread evenly over all captions (bank loss)."""

    def __post_init__(self) -> None:
        require(
            0.01 <= self.temperature < math.inf,
            "loss.temperature",
            "0.01 or more and finite (logit_scale is clamped at ln 100)",
            self.temperature,
        )
        require(0.0 <= self.label_smoothing < 1.0, "loss.label_smoothing", "in [0, 1)", self.label_smoothing)
        require(
            self.kind == "bank" or self.label_smoothing == 0.0, "loss.label_smoothing", "0 with loss.kind = infonce", self.label_smoothing
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """What happens to the training pictures at random; zero, `fixed` or `none` switches an operation off, and then it costs nothing."""

    rotate_degrees: float = 0.0
    """Angle drawn from [-x, x], counter-clockwise positive."""
    brightness: float = 0.0
    """Factor drawn from [1 - x, 1 + x]."""
    contrast: float = 0.0
    """Factor drawn from [1 - x, 1 + x], about 128."""
    saturation: float = 0.0
    """Factor drawn from [1 - x, 1 + x]."""
    flip_probability: float = 0.0
    """Probability of a horizontal flip of a tile."""
    alternating_flip: bool = False
    """Flip each photo in every other epoch instead of at random (half of the photos begin); flip_probability must be 0.5."""
    shift_pixels: int = 0
    """Whole-pixel shifts drawn from -x..x for each axis."""
    border: Literal["zero", "reflect"] = "zero"
    """What shift and rotation show beyond the edge of a tile: black, or the tile mirrored about its edge pixels."""
    cutout_size: int = 0
    """Side of a square at a random place of each tile that becomes the mean colour; it may hang over the edge."""
    swap_probability: float = 0.0
    """Probability that the tiles of a pair change places, and their names in the caption with them."""
    pairing: Literal["fixed", "resampled"] = "fixed"
    """`fixed`: the pairs as they were sharded; `resampled`: each epoch gives every left photo a new right one, and the caption to it."""
    mix: Literal["none", "mixup", "cutmix"] = "none"
    """Mix each pair with another pair and aim at both captions: a weighted sum of the pictures, or a box of one in the other."""
    mix_alpha: float = 1.0
    """The weight of a mixture is drawn from Beta(x, x); 1 is uniform, small values mix little."""
    mix_probability: float = 1.0
    """Share of the pairs that are mixed."""

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation", "flip_probability", "swap_probability", "mix_probability"):
            value = getattr(self, name)
            require(0.0 <= value <= 1.0, f"augment.{name}", "in [0, 1]", value)
        require(0.0 <= self.rotate_degrees <= 180.0, "augment.rotate_degrees", "in [0, 180]", self.rotate_degrees)
        require(0 <= self.shift_pixels <= 16, "augment.shift_pixels", "in 0..16", self.shift_pixels)
        require(0 <= self.cutout_size <= 4096, "augment.cutout_size", "in 0..4096", self.cutout_size)
        require(0.05 <= self.mix_alpha <= 100.0, "augment.mix_alpha", "in [0.05, 100]", self.mix_alpha)
        if self.alternating_flip:
            require(self.flip_probability == 0.5, "augment.flip_probability", "0.5 with augment.alternating_flip", self.flip_probability)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Optimizer, schedule and everything that acts on gradients or weights."""

    kind: Literal["adam", "adamw", "muon"] = "adamw"
    """`adam` applies weight decay to the gradient (as `torch.optim.Adam`), `adamw` decouples it; `muon` orthogonalises the
    updates of the trunk's matrices and filters and leaves all other parameters to AdamW."""
    lr: float = 1e-3
    """Peak learning rate (of the AdamW part, with muon)."""
    muon_lr: float = 0.2
    """Peak length of muon's updates, relative to an orthogonal weight; follows the same schedule."""
    muon_momentum: float = 0.6
    """Running-average factor of muon."""
    final_lr: float = 0.0
    """Learning rate at the last step."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Decay from the peak to `final_lr` after the warm-up, per step."""
    warmup_epochs: float = 0.0
    """Linear warm-up from near 0 to the peak; fractions of an epoch are fine."""
    weight_decay: float = 0.01
    """On matrices and filters."""
    decay_all: bool = False
    """Decay biases, norms, position embeddings and logit_scale too, as a plain `AdamW(model.parameters())` does."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's running-average factors."""
    eps: float = 1e-8
    """Adam's denominator offset."""
    clip_norm: float = 1.0
    """Largest global gradient norm; 0 for none."""
    accumulate: int = 1
    """Micro-batches per optimizer step; the batch size is that of the whole step."""
    ema_decay: float = 0.0
    """Decay per step of the averaged weights used for evaluation; 0 for none."""

    def __post_init__(self) -> None:
        require(0.0 < self.lr < math.inf, "optimizer.lr", "more than 0 and finite", self.lr)
        require(0.0 <= self.final_lr <= self.lr, "optimizer.final_lr", "in [0, lr]", self.final_lr)
        require(self.warmup_epochs >= 0.0, "optimizer.warmup_epochs", "0 or more", self.warmup_epochs)
        require(0.0 <= self.weight_decay < math.inf, "optimizer.weight_decay", "0 or more and finite", self.weight_decay)
        require(0.0 < self.muon_lr < math.inf, "optimizer.muon_lr", "more than 0 and finite", self.muon_lr)
        require(0.0 <= self.muon_momentum < 1.0, "optimizer.muon_momentum", "in [0, 1)", self.muon_momentum)
        require(all(0.0 <= b < 1.0 for b in self.betas), "optimizer.betas", "each in [0, 1)", self.betas)
        require(0.0 < self.eps < math.inf, "optimizer.eps", "more than 0 and finite", self.eps)
        require(self.clip_norm >= 0.0, "optimizer.clip_norm", "0 or more", self.clip_norm)
        require(self.accumulate >= 1, "optimizer.accumulate", "1 or more", self.accumulate)
        require(0.0 <= self.ema_decay < 1.0, "optimizer.ema_decay", "in [0, 1)", self.ema_decay)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """Length, precision and placement of the training."""

    epochs: int = 10
    """Passes over the training pairs."""
    batch_size: int = 256
    """Pairs per optimizer step, over all processes."""
    progressive: tuple[tuple[int, float], ...] = ()
    """Progressive resizing (Howard 2018): sides of the training tiles in pixels, in order, each with its share of the steps;
    empty for the size in the data. Small tiles cost less and teach the coarse first. Evaluation always sees whole tiles."""
    patience: int = 0
    """Stop after this many evaluations without a better held-out top-1; 0 for never."""
    amp: bool = False
    """Mixed precision where the device computes it natively."""
    compile: Literal["auto", "on", "off"] = "auto"
    """`torch.compile`: `auto` on CUDA only, `on` everywhere (falls back with a reason), `off` nowhere."""
    recompute: bool = False
    """Compute the encoder's activations again in the backward pass instead of keeping them: less memory, the same up to rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    loader: Literal["auto", "native", "dali", "reference"] = "auto"
    """Which loader feeds the training."""
    on_bad_record: Literal["raise", "skip", "substitute"] = "raise"
    """A record that has changed on disk or cannot be decoded: stop, leave its rows out, or take the next good sample."""
    seed: int = 0
    """Seed of weights, order and augmentation."""
    save_minutes: float = 5.0
    """Save a checkpoint at least this often, besides after every epoch."""
    tensorboard: bool = False
    """Also write TensorBoard files into the run folder."""

    def __post_init__(self) -> None:
        require(self.epochs >= 1, "train.epochs", "1 or more", self.epochs)
        require(self.batch_size >= 2, "train.batch_size", "2 or more (a contrastive loss needs a contrast)", self.batch_size)
        for size, share in self.progressive:
            require(size >= 1 and 0.0 < share <= 1.0, "train.progressive", "pairs of pixels >= 1 and a share in (0, 1]", self.progressive)
        shares = math.fsum(share for _, share in self.progressive)
        require(not self.progressive or abs(shares - 1.0) < 1e-6, "train.progressive", "shares that sum to 1", self.progressive)
        require(self.patience >= 0, "train.patience", "0 or more", self.patience)
        require(0 <= self.seed < 2**63, "train.seed", "in 0..2**63-1", self.seed)
        require(self.save_minutes > 0.0, "train.save_minutes", "more than 0", self.save_minutes)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that determines a run, apart from the data folder's content."""

    FORMAT: ClassVar[int] = 1
    preset: str = DEFAULT_PRESET
    """Name of the preset it started from."""
    model: ModelConfig = TileViTConfig()
    bank: BankConfig = BankConfig()
    loss: LossConfig = LossConfig()
    augment: AugmentConfig = AugmentConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        require(
            self.train.batch_size % self.optimizer.accumulate == 0,
            "optimizer.accumulate",
            f"a divisor of train.batch_size ({self.train.batch_size})",
            self.optimizer.accumulate,
        )
        require(
            self.optimizer.warmup_epochs <= self.train.epochs,
            "optimizer.warmup_epochs",
            f"at most train.epochs ({self.train.epochs})",
            self.optimizer.warmup_epochs,
        )
        sized = isinstance(self.model, TileConvConfig)
        require(
            sized or not self.train.progressive, "train.progressive", "empty unless model.architecture = tile_conv", self.train.progressive
        )
        least = min((size for size, _ in self.train.progressive), default=LEAST_CONV_TILE)
        require(least >= LEAST_CONV_TILE, "train.progressive", f"sides of {LEAST_CONV_TILE} pixels or more", self.train.progressive)
        require(self.augment.mix == "none" or self.loss.kind == "bank", "augment.mix", "none with loss.kind = infonce", self.augment.mix)


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("pairclip_fast") / "presets"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_preset(name: str, *, where: str = "--preset") -> RunConfig:
    """The preset `name`, which was asked for at `where`.

    Raises:
        ConfigError: there is no such preset.
    """
    names = preset_names()
    if name not in names:
        raise ConfigError("unknown preset", where=where, expected=", ".join(names), got=name, fix=_suggestion(name, names))
    text = (resources.files("pairclip_fast") / "presets" / f"{name}.toml").read_text()
    tables = tomllib.loads(text)
    return overlay(RunConfig(preset=name, model=_model_from(tables, where=name)), tables, where=f"preset {name}")


def read_toml(path: Path) -> dict[str, Any]:
    """The tables of a TOML file.

    Raises:
        ConfigError: the file is missing or is not TOML.
    """
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError("cannot read the config file", where=path, got=error.strerror) from error
    except ValueError as error:
        raise ConfigError("the config file is not valid TOML", where=path, got=error) from error


def overlay(base: RunConfig, tables: Mapping[str, Any], *, where: str) -> RunConfig:
    """`base` with the keys of `tables` replaced; a changed `model.architecture` starts from that architecture's defaults.

    Raises:
        ConfigError: unknown key (with the nearest known one), wrong type, or a value out of range.
    """
    merged = dataclasses.asdict(base)
    require(isinstance(tables.get("model", {}), dict), f"{where}: model", "a table", tables.get("model"))
    if tables.get("model", {}).get("architecture", base.model.architecture) != base.model.architecture:
        merged["model"] = dataclasses.asdict(_model_from(tables, where=where))
    known_model = [f.name for f in dataclasses.fields(MODEL_CONFIGS[merged["model"]["architecture"]])]
    for table, value in tables.items():
        _check_key(table, merged, where=where)
        if not isinstance(merged[table], dict):
            merged[table] = value
            continue
        require(isinstance(value, dict), f"{where}: {table}", "a table", value)
        for key in value:
            _check_key(key, known_model if table == "model" else merged[table], where=f"{where}: [{table}]")
        merged[table].update(value)
    rooms = {field.name: field for field in dataclasses.fields(RunConfig)}
    parts: dict[str, Any] = {}
    for name in rooms:
        kind = MODEL_CONFIGS[merged["model"]["architecture"]] if name == "model" else type(getattr(base, name))
        if dataclasses.is_dataclass(kind):
            hints = get_type_hints(kind)
            fields = {key: _typed(value, hints[key], where=f"{where}: [{name}] {key}") for key, value in merged[name].items()}
            parts[name] = kind(**fields)
        else:
            parts[name] = _typed(merged[name], kind, where=f"{where}: {name}")
    return RunConfig(**parts)


def to_toml(config: RunConfig) -> str:
    """The whole configuration as TOML; `overlay` reads it back to an equal value."""
    import tomli_w

    return tomli_w.dumps(dataclasses.asdict(config))


def _model_from(tables: Mapping[str, Any], *, where: str) -> ModelConfig:
    architecture = tables.get("model", {}).get("architecture")
    if architecture not in list(MODEL_CONFIGS):  # a file may say what cannot be hashed
        raise ConfigError("unknown architecture", where=f"{where}: model.architecture", expected=", ".join(MODEL_CONFIGS), got=architecture)
    return MODEL_CONFIGS[architecture]()


def _typed(value: Any, kind: Any, *, where: str) -> Any:
    """`value` as TOML gives it, as a field's type: lists become tuples, whole numbers may stand for others.

    Raises:
        ConfigError: it is none of that type.
    """
    import msgspec

    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        expected = ", ".join(map(repr, get_args(kind))) if get_origin(kind) is Literal else words.get(kind, str(kind))
        raise ConfigError("wrong value in the configuration", where=where, expected=expected, got=repr(value)) from error


def _check_key(key: str, known: Collection[str], *, where: str) -> None:
    if key not in known:
        homes = [table for table, value in known.items() if isinstance(value, dict) and key in value] if isinstance(known, dict) else []
        fix = f"put it under [{homes[0]}]" if homes else _suggestion(key, list(known))
        raise ConfigError("unknown key in the configuration", where=where, expected=", ".join(known), got=key, fix=fix)


def _suggestion(word: str, known: list[str]) -> str | None:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else None
