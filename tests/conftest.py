"""What every test runs under: one thread, no network, fixed seeds, shapes and dtypes checked, skips counted aloud.

The jaxtyping hook turns the annotations of the torch rooms into run-time checks; it must be installed before these
rooms are imported, hence at the top. Torch itself is not imported here: the tests of the light rooms stay light.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import hypothesis
import pytest
from jaxtyping import install_import_hook

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # two busy thread pools on two cores slow each other down a hundredfold
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

CHECKED_ROOMS = ("data", "text", "models", "kernels", "losses", "metrics", "evaluate", "train", "telemetry")
"""Rooms whose annotations are checked at run time in the tests."""

# An int is welcome where a float is annotated, as PEP 484 has it and mypy too.
install_import_hook(
    [f"pairclip_fast.{room}" for room in CHECKED_ROOMS], "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
)

hypothesis.settings.register_profile("default-here", deadline=None, max_examples=50, print_blob=True)
hypothesis.settings.register_profile("nightly", deadline=None, max_examples=1_000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("PAIRCLIP_HYPOTHESIS", "default-here"))


@pytest.fixture(autouse=True)
def _same_start() -> None:
    """One thread and the same generator state before every test that has torch loaded."""
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def cifar100_folder() -> Path:
    """Folder with the real images (`train.parquet`), named by PAIRCLIP_CIFAR100; without it the test is skipped."""
    folder = os.environ.get("PAIRCLIP_CIFAR100")
    if not folder:
        pytest.skip("PAIRCLIP_CIFAR100 names no folder with CIFAR-100 images")
    if not (Path(folder) / "train.parquet").is_file():
        pytest.fail(f"PAIRCLIP_CIFAR100={folder} has no train.parquet")
    return Path(folder).resolve()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where there is no CUDA device."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device on this machine"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests were skipped and why: a green run that tested nothing must not look like one that did."""
    reasons: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        where_and_why = report.longrepr
        reason = where_and_why[2] if isinstance(where_and_why, tuple) else str(where_and_why)
        reasons[reason.removeprefix("Skipped: ")] += 1
    terminalreporter.section(f"{reasons.total()} tests skipped")
    for reason, count in sorted(reasons.items()):
        terminalreporter.write_line(f"{count:5d}  {reason}")
