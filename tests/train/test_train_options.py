"""Preset, config file and flags become one configuration; torch is not needed for it."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pairclip_fast.config import load_preset
from pairclip_fast.errors import ConfigError, StorageError
from pairclip_fast.train.options import TrainOptions, resolve_config
from pairclip_fast.train.run_folder import choose, write_config


def test_no_options_is_the_default_preset() -> None:
    assert resolve_config(TrainOptions()) == load_preset("vit")


def test_flags_beat_the_file_and_the_file_beats_the_preset(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nepochs = 7\nbatch_size = 64\n[optimizer]\nweight_decay = 0.5\n")
    config = resolve_config(TrainOptions(preset="fast", config=path, epochs=9, amp=True, loss="infonce", bank="raw", device="cpu", seed=4))
    fast = load_preset("fast")
    assert (config.train.epochs, config.train.batch_size, config.optimizer.weight_decay) == (9, 64, 0.5)
    assert (config.train.amp, config.loss.kind, config.bank.kind, config.train.device, config.train.seed) == (
        True,
        "infonce",
        "raw",
        "cpu",
        4,
    )
    assert config.model == fast.model
    assert config.loss.label_smoothing == 0.0
    assert config.bank.rank == fast.bank.rank


def test_all_of_the_augmentation_can_be_set_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    wanted = {
        "flip_probability": 0.5,
        "alternating_flip": True,
        "shift_pixels": 2,
        "border": "reflect",
        "cutout_size": 10,
        "swap_probability": 0.5,
        "pairing": "resampled",
        "mix": "cutmix",
        "mix_alpha": 0.5,
        "mix_probability": 0.25,
    }
    path.write_text("[augment]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in wanted.items()))
    config = resolve_config(TrainOptions(preset="fast", config=path))
    assert wanted.items() <= dataclasses.asdict(config.augment).items()
    assert resolve_config(TrainOptions(preset="fast", config=path, loss="infonce")).augment.mix == "none"


def test_the_file_may_name_the_preset_and_the_flag_beats_it(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('preset = "baseline"\n[train]\nseed = 5\n')
    assert resolve_config(TrainOptions(config=path)) == dataclasses.replace(
        load_preset("baseline"), train=dataclasses.replace(load_preset("baseline").train, seed=5)
    )
    assert resolve_config(TrainOptions(config=path, preset="fast")).model == load_preset("fast").model
    assert resolve_config(TrainOptions(config=path, preset="fast")).preset == "fast"


def test_a_low_rate_lowers_the_final_one_and_few_epochs_shorten_the_warmup() -> None:
    enhanced = load_preset("enhanced")
    config = resolve_config(TrainOptions(preset="enhanced", lr=1e-6, epochs=1))
    assert (config.optimizer.lr, config.optimizer.final_lr) == (1e-6, 1e-6)
    assert config.optimizer.warmup_epochs == pytest.approx(enhanced.optimizer.warmup_epochs / enhanced.train.epochs)
    as_many = resolve_config(TrainOptions(preset="enhanced", epochs=2))
    assert as_many.optimizer.warmup_epochs == pytest.approx(0.2), "or the whole run would be warm-up"
    assert resolve_config(TrainOptions(preset="enhanced", epochs=3)).optimizer.warmup_epochs == enhanced.optimizer.warmup_epochs


def test_the_default_temperature_of_presets_is_untouched_by_flags() -> None:
    assert resolve_config(TrainOptions(preset="baseline", epochs=1)).loss == load_preset("baseline").loss


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (TrainOptions(preset="vitt"), "vit"),
        (TrainOptions(epochs=0), "train.epochs"),
        (TrainOptions(batch_size=1), "train.batch_size"),
        (TrainOptions(lr=-1.0), "optimizer.lr"),
        (TrainOptions(config=Path("no-such.toml")), "no-such.toml"),
    ],
)
def test_nonsense_is_refused_with_the_field(options: TrainOptions, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        resolve_config(options)


ONE_COMMAND_LINE = [
    ("[optimizer]\nwarmup_epochs = 2.0\n", {"epochs": 1}),
    ("[optimizer]\nfinal_lr = 1e-3\n", {"lr": 1e-4}),
    ("[loss]\nlabel_smoothing = 0.1\n", {"loss": "infonce"}),
    ("[augment]\nmix = 'mixup'\n", {"loss": "infonce"}),
    ("[optimizer]\naccumulate = 3\n", {"batch_size": 96}),
    ("[train]\nbatch_size = 96\n[optimizer]\naccumulate = 3\n", {"batch_size": 144}),
    ("[train]\nepochs = 3\n", {"preset": "fast", "epochs": 1, "device": "cpu"}),
]
"""A file, and flags that the file does not fit to alone or whose consequences it does not fit to."""


@pytest.mark.parametrize(("file", "flags"), ONE_COMMAND_LINE)
def test_the_command_line_that_started_a_run_resumes_it(tmp_path: Path, file: str, flags: dict[str, Any]) -> None:
    path = tmp_path / "run.toml"
    path.write_text(file)
    options = TrainOptions(config=path, out=tmp_path / "run", data=tmp_path, resume=True, **flags)
    started = choose(options)
    assert not started.resumes
    write_config(started.folder, started.config)
    again = choose(options)
    assert again.resumes
    assert again.config == started.config
    with pytest.raises(ConfigError):
        choose(dataclasses.replace(options, seed=3))


def test_a_resumed_run_is_placed_as_the_options_say_and_else_as_it_was(tmp_path: Path) -> None:
    options = TrainOptions(out=tmp_path / "run", data=tmp_path, resume=True, device="cpu", loader="native")
    write_config(tmp_path / "run", choose(options).config)
    train = choose(dataclasses.replace(options, device=None, loader="reference", compile="off")).config.train
    assert (train.device, train.loader, train.compile) == ("cpu", "reference", "off")


@pytest.mark.parametrize("preset", [None, "fast"])
def test_what_a_memory_budget_has_settled_stays(tmp_path: Path, preset: str | None) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[optimizer]\naccumulate = 2\n[train]\nrecompute = false\n")
    options = TrainOptions(preset="fast", config=path, out=tmp_path / "run", data=tmp_path, resume=True, memory_budget="2GiB")
    config = choose(options).config
    pieces, train = (dataclasses.replace(config.optimizer, accumulate=8), dataclasses.replace(config.train, recompute=True))
    settled = dataclasses.replace(config, optimizer=pieces, train=train)
    write_config(tmp_path / "run", settled)
    assert choose(dataclasses.replace(options, preset=preset)).config == settled
    with pytest.raises(ConfigError, match=r"optimizer\.accumulate: 8 -> 2"):
        choose(dataclasses.replace(options, preset=preset, memory_budget=None))


def test_a_run_folder_that_we_may_not_look_into_is_a_storage_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(_path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    for question in ("is_file", "exists"):
        monkeypatch.setattr(Path, question, deny)
    with pytest.raises(StorageError, match="Permission denied"):
        choose(TrainOptions(out=tmp_path / "run"))


def test_options_and_run_folders_do_not_import_torch() -> None:
    code = (
        "import sys; from pairclip_fast.train.options import TrainOptions, resolve_config; import pairclip_fast.train.run_folder;"
        "resolve_config(TrainOptions(preset='fast', epochs=2)); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
