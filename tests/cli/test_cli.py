"""The command line's contract: instant help, a frozen list of options, exit codes, and no traceback for users."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pairclip_fast import __version__, cli
from pairclip_fast.errors import PairclipError

PROGRAM = (sys.executable, "-m", "pairclip_fast.cli")
HELP_SECONDS = 0.5
HEAVY = ("torch", "torchvision", "numpy", "transformers", "nvidia", "webdataset", "pyarrow", "matplotlib", "jaxtyping")

OPTIONS = {
    "shard": {
        "--source", "--path", "--test-path", "--out", "--num-pairs", "--val-fraction", "--different-class-prob",
        "--template", "--encoding", "--shard-size", "--seed", "--on-bad", "--overwrite", "--dry-run", "--json",
    },
    "embed": {"--data", "--text-encoder", "--batch-size", "--features", "--preset", "--json"},
    "train": {
        "--data", "--out", "--preset", "--amp", "--epochs", "--batch-size", "--lr", "--loader", "--on-bad-record", "--loss", "--bank",
        "--compile", "--device", "--memory-budget", "--seed", "--resume", "--config", "--text-encoder", "--dry-run", "--json",
    },
    "eval": {"--run", "--data", "--split", "--json"},
    "report": {"--run", "--json"},
    "verify": {"--data", "--json"},
    "doctor": {"--verify-kernels", "--json"},
}  # fmt: skip
"""The golden list: an option added or renamed must be added or renamed here, knowingly."""


def run(*arguments: str, environment: dict[str, str] | None = None, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The program in a process of its own."""
    return subprocess.run(
        [*PROGRAM, *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(environment or {})},
    )


def cpu_seconds(*arguments: str) -> float:
    """User and system time of one run: unlike the clock it does not count the neighbours of a shared machine."""
    child = subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _pid, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0
    return usage.ru_utime + usage.ru_stime


def offered(command: str) -> set[str]:
    """Long options in a command's help, without the ones that every program has."""
    text = run(command, "--help", environment={"COLUMNS": "200"}).stdout
    words = text.replace("[", " ").replace("]", " ").replace(",", " ").replace("|", " ").replace("\u2502", " ").split()
    return {word for word in words if word.startswith("--") and len(word) > 2} - {"--help"}


def test_commands_are_the_golden_list() -> None:
    assert set(cli.COMMANDS) == set(OPTIONS)


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_options_are_the_golden_list(command: str) -> None:
    assert offered(command) == OPTIONS[command]


ANSWERED_AT_ONCE = (
    ["--help"],
    ["train", "--help"],
    ["train", "--no-such-flag"],
    ["train", "--preset", "enhansed"],
    ["train", "--batch-size", "1"],
    ["train", "--memory-budget", "plenty"],
    ["train", "--config", "nowhere.toml"],
    ["eval", "--run", "nowhere"],
    ["report", "--run", "nowhere"],
    ["shard", "--val-fraction", "2"],
)


@pytest.mark.parametrize("arguments", [("--help",), ("train", "--help")], ids=" ".join)
def test_help_takes_less_than_half_a_second(arguments: tuple[str, ...]) -> None:
    assert statistics.median(cpu_seconds(*arguments) for _ in range(3)) < HELP_SECONDS


@pytest.mark.parametrize("arguments", ANSWERED_AT_ONCE, ids=" ".join)
def test_nothing_heavy_is_imported_to_answer_at_once(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom pairclip_fast.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        f"sys.stderr.write('loaded: ' + ' '.join(name for name in {HEAVY!r} if name in sys.modules))"
    )
    allowed = {"report": {"numpy"}}.get(arguments[0], set())
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert set(shown.rpartition("loaded: ")[2].split()) <= allowed


def test_every_command_is_listed_with_a_sentence() -> None:
    text = run("--help").stdout
    for command in OPTIONS:
        assert command in text


def test_no_arguments_show_the_help() -> None:
    assert run().stdout == run("--help").stdout


def test_version() -> None:
    assert run("--version").stdout == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("trian",), "train"),
        (("train", "--epoch", "3"), "--epochs"),
        (("train", "--epochs", "many"), "epochs"),
        (("train", "--epochs"), "epochs"),
        (("train", "--preset", "enhansed"), "enhanced"),
        (("train", "--loader", "fast"), "dali"),
        (("train", "--batch-size", "1"), "batch"),
        (("shard", "--val-fraction", "2"), "val"),
        (("shard", "--encoding", "gif"), "png"),
        (("eval",), "--run"),
        (("train", "--config", "nowhere.toml"), "nowhere.toml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_usage_exits_2_and_names_it(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 2, result.stderr
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [("verify", "--data", "nowhere"), ("train", "--data", "nowhere"), ("eval", "--run", "nowhere"), ("report", "--run", "nowhere")],
    ids=" ".join,
)
def test_a_missing_folder_is_named(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = run(*arguments, folder=tmp_path)
    assert result.returncode == 2
    assert "nowhere" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "environment", [{"LC_ALL": "C", "PYTHONUTF8": "0"}, {"NO_COLOR": "1"}, {"COLUMNS": "1"}, {"TERM": "dumb"}], ids=str
)
def test_help_under_odd_terminals(environment: dict[str, str]) -> None:
    result = run("--help", environment=environment)
    assert result.returncode == 0
    assert "\x1b" not in result.stdout
    assert result.stderr == ""


def test_no_home_is_no_problem() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "HOME"}
    result = subprocess.run([*PROGRAM, "--help"], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("arguments", ["--help", "--version", "doctor", "train --help"])
def test_a_reader_that_went_away_gets_no_traceback(arguments: str) -> None:
    shell = f"{sys.executable} -m pairclip_fast.cli {arguments} | true; exit ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=False)
    assert "Traceback" not in result.stderr
    assert "BrokenPipe" not in result.stderr


def test_a_closed_stdout_gets_no_traceback() -> None:
    result = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m pairclip_fast.cli --version >&-"], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in result.stderr


def test_expected_failures_have_no_traceback_unless_asked(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(_options: object) -> None:
        raise PairclipError("the disk \x1b[2J is odd")

    monkeypatch.setattr(cli, "run", fail)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "pairclip-fast: the disk \\x1b[2J is odd\n"
    with pytest.raises(PairclipError):
        cli.main(["doctor", "--debug"])


def test_an_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(_options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "run", interrupt)
    assert cli.main(["doctor"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_the_first_process_prints_the_result_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pairclip_fast.train.commands.run_train", lambda _options: {"steps": 3})
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert cli.main(["train", "--out", str(tmp_path / "run"), "--json"]) == 0
    assert capsys.readouterr().out == '{"steps": 3}\n', "one JSON object"


def test_dry_run_touches_nothing(tmp_path: Path) -> None:
    source, folder = tmp_path / "source", tmp_path / "work"
    folder.mkdir()
    for name, shade in (("black", 0), ("white", 255)):
        (source / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (32, 32), (shade, shade, number)).save(source / name / f"{number}.png")
    before = snapshot(tmp_path)
    result = run(
        "shard", "--source", "imagefolder", "--path", str(source), "--val-fraction", "0.4", "--num-pairs", "77", "--dry-run", folder=folder
    )
    assert result.returncode == 0, result.stderr
    assert "77" in result.stdout + result.stderr
    assert snapshot(tmp_path) == before


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything under a folder with its size and time of change."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.rglob("*"))}
