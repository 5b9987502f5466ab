"""`pairclip-fast doctor --verify-kernels`: do the bank operations compute the right numbers here, and how long do they take?

The implementation in use is held against float64 and timed beside torch's blocked operations, in turns, so that a slow moment
of the machine hits both. For GPUs with a known data sheet the table also gives the least time possible, which is an estimate.
The table and its JSON are made to be pasted into a report.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.gpus import find_gpu
from pairclip_fast.kernels import portable
from pairclip_fast.kernels.choice import Kernels, implementation, kernels_for
from pairclip_fast.kernels.roofline import Operation, bound
from pairclip_fast.kernels.selfcheck import TOP, Case, comparisons, make_case
from pairclip_fast.telemetry.machine import cpu_model

SIZES = {"cpu": {"batch": 256, "captions": 4_500, "dim": 512}, "cuda": {"batch": 4_096, "captions": 10_000, "dim": 512}}
"""Seconds on either."""
DTYPES = (torch.float32, torch.bfloat16)
REPEATS = 7
LINE = "{:13} {:9} {:>22}  {:5} {:9.3f} {:9.3f} {:6.2f} {:>19}"
HEADING = "{:13} {:9} {:>22}  {:5} {:>9} {:>9} {:>6} {:>19}".format(
    "operation", "dtype", "rows, captions, dim", "", "ms", "torch ms", "ratio", "at best (estimate)"
)


def verify_kernels(device: torch.device, *, events: EventLog) -> dict[str, Any]:
    """Check and time all operations on `device`.

    Returns:
        `device`, `repeats`, and `rows`: one dictionary per operation and dtype with the implementation and why it is that one,
        sizes, the worst difference to float64 of each output beside what is allowed, medians and quartiles in ms, and an
        estimate or None.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    rows: list[dict[str, Any]] = []
    with events.progress("verifying kernels", total=len(DTYPES), unit="dtypes") as advance:
        for dtype in DTYPES:
            chosen = implementation(device, dtype=dtype, dim=SIZES[device.type]["dim"])
            case = make_case(device=device, dtype=dtype, **SIZES[device.type])
            rows += [{"implementation": chosen.name, "reason": chosen.reason} | row for row in _rows(case, name)]
            advance(1)
    return {"device": name, "repeats": REPEATS, "rows": rows}


def refuse_wrong_kernels(verified: dict[str, Any]) -> None:
    """End with exit code 5 if an operation computes something else than torch.

    Raises:
        EnvironmentLackingError: names the operations.
    """
    wrong = [f"{row['operation']} ({row['dtype']})" for row in verified["rows"] if not row["ok"]]
    if wrong:
        raise EnvironmentLackingError(
            "kernels compute wrong numbers on this device",
            got=", ".join(wrong),
            fix="set PAIRCLIP_BACKEND=torch, and please report the table",
        )


def render_verification(verified: dict[str, Any]) -> str:
    """The table as text."""
    used = {row["dtype"]: f"{row['dtype']} by {row['implementation']} ({row['reason']})" for row in verified["rows"]}
    lines = [f"Kernels on {verified['device']}: {'; '.join(used.values())}", HEADING]
    for row in verified["rows"]:
        size = f"{row['batch']} x {row['captions']} x {row['dim']}"
        verdict, ratio = "right" if row["ok"] else "WRONG", row["torch_ms"] / row["ms"]
        least = "-" if row["estimate_ms"] is None else f"{row['estimate_ms']:.3f}"
        lines.append(LINE.format(row["operation"], row["dtype"], size, verdict, row["ms"], row["torch_ms"], ratio, least))
        wrong = [found for found in row["outputs"] if not found["ok"]]
        lines += [f"    {found['output']}: off by {found['worst']:.2g}, {found['allowed']:.2g} allowed" for found in wrong]
    return "\n".join(lines)


def _rows(case: Case, device_name: str) -> Iterator[dict[str, Any]]:
    kernels = kernels_for(case.emb, case.bank)
    found = list(comparisons(kernels, case))
    batch, dim = case.emb.shape
    sizes = {"batch": batch, "captions": len(case.bank), "dim": dim}
    gpu = find_gpu(device_name)
    for operation in dict.fromkeys(comparison.operation for comparison in found):
        outputs = [
            {"output": comparison.output, "worst": comparison.worst, "allowed": comparison.allowed, "ok": comparison.ok}
            for comparison in found
            if comparison.operation == operation
        ]
        own, plain = _timed(_call(kernels, operation, case), _call(cast(Kernels, portable), operation, case), case.emb.device)
        chosen = TOP if operation == "bank_topk" else case.chosen.shape[1]
        estimate = bound(gpu, cast(Operation, operation), dtype=case.emb.dtype, chosen=chosen, **sizes) if gpu and gpu.tf32_tflops else None
        yield {
            "operation": operation, "dtype": str(case.emb.dtype).removeprefix("torch."), **sizes,
            "ok": all(output["ok"] for output in outputs), "outputs": outputs,
            "ms": own[1], "ms_quartiles": [own[0], own[2]], "torch_ms": plain[1], "torch_ms_quartiles": [plain[0], plain[2]],
            "estimate_ms": estimate.milliseconds if estimate else None,
        }  # fmt: skip


def _call(kernels: Kernels, operation: str, case: Case) -> Callable[[], object]:
    return {
        "bank_softmax": lambda: kernels.bank_softmax(case.emb, case.bank, case.scale),
        "bank_stats": lambda: kernels.bank_stats(case.emb, case.bank, case.scale, case.targets, case.groups),
        "pair_scores": lambda: kernels.pair_scores(case.emb, case.bank, case.chosen),
        "bank_topk": lambda: kernels.bank_topk(case.emb, case.bank, TOP),
    }[operation]


def _timed(own: Callable[[], object], plain: Callable[[], object], device: torch.device) -> tuple[list[float], list[float]]:
    """Quartiles in ms of both, taking turns after a first call of each (which compiles or fills caches)."""
    times: tuple[list[float], list[float]] = ([], [])
    for repeat in range(REPEATS + 1):
        for call, kept in zip((own, plain), times, strict=True):
            _synchronise(device)
            start = time.perf_counter()
            call()
            _synchronise(device)
            if repeat:
                kept.append(1e3 * (time.perf_counter() - start))
    return statistics.quantiles(times[0], n=4, method="inclusive"), statistics.quantiles(times[1], n=4, method="inclusive")


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
