"""One frozen configuration: presets, overlays, and words for every mistake, without torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pairclip_fast import config as configs
from pairclip_fast.config import RunConfig, load_preset, overlay, preset_names, to_toml
from pairclip_fast.errors import ConfigError
from pairclip_fast.train.options import TrainOptions, resolve_config

unit = st.floats(0.0, 1.0)
below_one = st.floats(0.0, 1.0, exclude_max=True)
size = st.integers(1, 4096)
activations = st.sampled_from(["gelu", "relu"])
models = st.one_of(
    st.builds(
        lambda heads, per_head, **rest: configs.ViTConfig(heads=heads, width=heads * per_head, **rest),
        heads=st.integers(1, 16),
        per_head=st.integers(1, 64),
        depth=size,
        mlp_width=size,
        patch_size=size,
        pre_norm=st.booleans(),
        activation=activations,
    ),
    st.builds(
        configs.TileViTConfig, width=st.just(192), heads=st.sampled_from([1, 2, 3]), depth=size, patch_size=st.sampled_from([2, 4, 8])
    ),
    st.builds(configs.TileConvConfig, width=size, residuals=st.integers(0, 3), activation=st.sampled_from(["gelu", "relu", "silu"])),
)
bank_losses = st.builds(configs.LossConfig, kind=st.just("bank"), temperature=st.floats(0.01, 10.0), label_smoothing=below_one)
losses = st.one_of(
    bank_losses,
    st.builds(configs.LossConfig, kind=st.just("infonce"), temperature=st.floats(0.01, 10.0), learn_temperature=st.booleans()),
)
augments = st.builds(
    lambda flips, **rest: configs.AugmentConfig(flip_probability=flips or 0.5, alternating_flip=flips is None, **rest),
    flips=st.one_of(st.none(), unit),
    rotate_degrees=st.floats(0.0, 180.0),
    brightness=unit,
    contrast=unit,
    saturation=unit,
    shift_pixels=st.integers(0, 16),
    border=st.sampled_from(["zero", "reflect"]),
    cutout_size=st.integers(0, 64),
    swap_probability=unit,
    pairing=st.sampled_from(["fixed", "resampled"]),
    mix_alpha=st.floats(0.05, 100.0),
    mix_probability=unit,
)
mixing_augments = st.builds(dataclasses.replace, augments, mix=st.sampled_from(["mixup", "cutmix"]))
optimizers = st.builds(
    lambda lr, share, **rest: configs.OptimizerConfig(lr=lr, final_lr=lr * share, **rest),
    lr=st.floats(1e-8, 10.0),
    share=st.sampled_from([0.0, 0.5, 1.0]),
    kind=st.sampled_from(["adam", "adamw", "muon"]),
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    warmup_epochs=below_one,
    weight_decay=st.floats(0.0, 10.0),
    decay_all=st.booleans(),
    betas=st.tuples(below_one, below_one),
    clip_norm=st.floats(0.0, 100.0),
    ema_decay=below_one,
)
trainings = st.builds(
    configs.TrainConfig,
    epochs=size,
    batch_size=st.integers(2, 65_536),
    patience=st.integers(0, 100),
    amp=st.booleans(),
    compile=st.sampled_from(["auto", "on", "off"]),
    device=st.sampled_from(["auto", "cpu", "cuda"]),
    loader=st.sampled_from(["auto", "native", "dali", "reference"]),
    seed=st.integers(0, 2**63 - 1),
    save_minutes=st.floats(0.01, 1e6),
)
rooms = {"preset": st.sampled_from(["vit", "fast"]), "model": models, "optimizer": optimizers, "train": trainings}
runs = st.one_of(
    st.builds(RunConfig, loss=losses, augment=augments, **rooms),
    st.builds(RunConfig, loss=bank_losses, augment=mixing_augments, **rooms),
)


@given(runs, runs)
def test_toml_round_trip_over_any_base(run: RunConfig, base: RunConfig) -> None:
    assert overlay(base, tomllib.loads(to_toml(run)), where="run.toml") == run


@pytest.mark.parametrize("name", ["baseline", "enhanced", "fast", "vit"])
def test_presets_load_and_name_themselves(name: str) -> None:
    preset = load_preset(name)
    assert preset.preset == name
    assert overlay(RunConfig(), tomllib.loads(to_toml(preset)), where="test") == preset


def test_preset_names_are_the_contract() -> None:
    assert preset_names() == ["baseline", "enhanced", "fast", "vit"]
    assert configs.DEFAULT_PRESET == "vit"


def test_enhanced_is_the_reports_setting() -> None:
    run = load_preset("enhanced")
    assert run.model == configs.ViTConfig(width=512, depth=6, heads=8, mlp_width=2048, patch_size=8)
    assert (run.loss.temperature, run.loss.learn_temperature, run.bank.kind) == (0.07, False, "raw")
    optimizer = run.optimizer
    assert (optimizer.kind, optimizer.lr, optimizer.final_lr, optimizer.weight_decay) == ("adamw", 1e-3, 1e-5, 0.01)
    assert (optimizer.schedule, optimizer.warmup_epochs, optimizer.clip_norm) == ("cosine", 2, 1.0)
    assert (run.train.epochs, run.train.batch_size, run.train.patience) == (20, 32, 5)
    augment = run.augment
    assert (augment.rotate_degrees, augment.brightness, augment.contrast, augment.saturation, augment.flip_probability) == (
        10,
        0.2,
        0.2,
        0.2,
        0.5,
    )


def test_baseline_is_the_reports_setting() -> None:
    run = load_preset("baseline")
    assert isinstance(run.model, configs.ViTConfig)
    assert (run.model.width, run.model.depth, run.model.heads, run.model.mlp_width) == (512, 1, 1, 1024)
    assert (run.optimizer.kind, run.train.epochs, run.train.batch_size) == ("adam", 4, 32)
    assert run.augment == configs.AugmentConfig()


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'enhanced'") as failure:
        load_preset("enhansed")
    assert failure.value.exit_code == 2


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"trian": {}}, ["trian", "did you mean 'train'"]),
        ({"train": {"batchsize": 3}}, ["[train]", "did you mean 'batch_size'"]),
        ({"model": {"widht": 3}}, ["[model]", "did you mean 'width'"]),
        ({"model": {"architecture": "vit", "stem_width": 3}}, ["[model]", "stem_width"]),
        ({"model": {"architecture": "resnet"}}, ["unknown architecture", "resnet", "tile_conv"]),
        ({"model": 3}, ["model", "a table", "3"]),
        ({"train": 3}, ["train", "a table", "3"]),
        ({"train": {"epochs": "many"}}, ["[train]", "wrong value", "epochs"]),
        ({"train": {"epochs": 2.5}}, ["[train]", "wrong value", "epochs"]),
        ({"train": {"amp": 1}}, ["[train]", "wrong value", "amp"]),
        ({"optimizer": {"betas": [0.9]}}, ["[optimizer]", "wrong value", "betas"]),
        ({"loss": {"kind": "hinge"}}, ["[loss] kind", "wrong value", "'bank', 'infonce'", "hinge"]),
        ({"epochs": 3}, ["epochs", "put it under [train]"]),
        ({"preset": 5}, ["wrong value", "preset"]),
        ({"train": {"batch_size": 1}}, ["train.batch_size", "2 or more", "contrast"]),
        ({"train": {"seed": -1}}, ["train.seed"]),
        ({"loss": {"temperature": 0.001}}, ["loss.temperature", "0.01 or more"]),
        ({"loss": {"kind": "infonce", "label_smoothing": 0.1}}, ["loss.label_smoothing", "infonce"]),
        ({"optimizer": {"final_lr": 1.0}}, ["optimizer.final_lr", "in [0, lr]"]),
        ({"optimizer": {"accumulate": 3}}, ["optimizer.accumulate", "a divisor"]),
        ({"optimizer": {"warmup_epochs": 1000.0}}, ["optimizer.warmup_epochs", "at most train.epochs"]),
        ({"optimizer": {"lr": float("nan")}}, ["optimizer.lr"]),
        ({"optimizer": {"lr": float("inf")}}, ["optimizer.lr", "finite"]),
        ({"loss": {"temperature": float("inf")}}, ["loss.temperature", "finite"]),
        ({"augment": {"flip_probability": 1.5}}, ["augment.flip_probability"]),
        ({"augment": {"border": "reflekt"}}, ["[augment]", "wrong value", "reflekt"]),
        ({"augment": {"cutout_size": -1}}, ["augment.cutout_size"]),
        ({"augment": {"mix_alpha": 0.0}}, ["augment.mix_alpha", "0.05"]),
        ({"augment": {"alternating_flip": True}}, ["augment.flip_probability", "0.5", "alternating_flip"]),
        ({"augment": {"mix": "mixup"}, "loss": {"kind": "infonce"}}, ["augment.mix", "infonce"]),
        ({"model": {"architecture": "vit", "heads": 7}}, ["model.heads", "a divisor of model.width (512)"]),
        ({"model": {"architecture": "vit", "heads": 0}}, ["model", "positive sizes"]),
        ({"model": {"architecture": "tile_vit", "heads": 0}}, ["model", "positive sizes"]),
        ({"model": {"architecture": "vit", "width": 0}}, ["model", "positive sizes"]),
        ({"model": {"architecture": "tile_vit", "width": 0}}, ["model", "positive sizes"]),
        ({"model": {"architecture": ["vit"]}}, ["unknown architecture", "['vit']"]),
        ({"model": {"architecture": "tile_conv", "residuals": -1}}, ["model.residuals", "0 or more"]),
        ({"optimizer": {"eps": -1.0}}, ["optimizer.eps"]),
        ({"optimizer": {"muon_lr": -1.0}}, ["optimizer.muon_lr"]),
        ({"optimizer": {"muon_momentum": 2.0}}, ["optimizer.muon_momentum"]),
        ({"model": {"architecture": "tile_conv"}, "train": {"progressive": [[8, 0.5], [32, 0.5]]}}, ["train.progressive", "9 pixels"]),
    ],
)
def test_every_mistake_is_named(tables: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as failure:
        overlay(RunConfig(), tables, where="run.toml")
    assert failure.value.exit_code == 2
    for word in words:
        assert word in str(failure.value)


def test_a_mistake_in_a_file_is_looked_for_there(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('preset = "fst"')
    with pytest.raises(ConfigError, match=r"run\.toml: preset"):
        resolve_config(TrainOptions(config=tmp_path / "run.toml"))


def test_overlay_keeps_what_is_not_named() -> None:
    base = load_preset("enhanced")
    run = overlay(base, {"train": {"epochs": 3}}, where="flags")
    assert run == dataclasses.replace(base, train=dataclasses.replace(base.train, epochs=3))


def test_another_architecture_starts_from_its_own_defaults() -> None:
    run = overlay(load_preset("enhanced"), {"model": {"architecture": "tile_conv", "width": 8}}, where="flags")
    assert run.model == configs.TileConvConfig(width=8)


def test_config_file_is_an_overlay(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text("[optimizer]\nlr = 1\n")
    assert resolve_config(TrainOptions(preset="fast", config=tmp_path / "run.toml")).optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot read"), ("[train", "not valid TOML"), ("[train]\nepoch = 3", "did you mean 'epochs'")]
)
def test_bad_config_files_are_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "run.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=words) as failure:
        resolve_config(TrainOptions(config=path))
    assert str(path) in str(failure.value)


def test_a_config_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid TOML"):
        resolve_config(TrainOptions(config=tmp_path / "run.toml"))


def test_every_field_is_documented() -> None:
    source = Path(configs.__file__).read_text().splitlines()
    for kind in (*configs.MODEL_CONFIGS.values(), configs.BankConfig, configs.LossConfig, configs.AugmentConfig, configs.TrainConfig):
        for field in dataclasses.fields(kind):
            if field.name != "architecture":
                places = [i for i, line in enumerate(source) if line.startswith(f"    {field.name}: ")]
                assert any(source[i + 1].strip().startswith('"""') for i in places), f"{kind.__name__}.{field.name}"


def test_the_light_rooms_import_no_heavy_library() -> None:
    heavy = ("torch", "numpy", "transformers", "nvidia", "webdataset", "matplotlib", "pyarrow", "jaxtyping")
    code = (
        "import sys\nfrom pairclip_fast import config, errors, events, storage\n"
        "config.overlay(config.load_preset('vit'), {}, where='test')\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
