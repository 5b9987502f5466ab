"""TensorBoard files as a view of the event log: a sink that turns `step` and `eval` events into scalars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.events import Event, Sink

STEP_FIELDS = ("loss", "lr", "logit_scale", "grad_norm", "pairs_per_second", "tflops", "data_wait_fraction")


def tensorboard_sink(folder: Path) -> Sink:
    """A sink that writes into `folder`.

    Raises:
        EnvironmentLackingError: the package `tensorboard` is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise EnvironmentLackingError(
            "TensorBoard files need the package tensorboard",
            where="train.tensorboard",
            got=error,
            fix="pip install 'pairclip-fast[tensorboard]', or set train.tensorboard = false",
        ) from error
    writer: Any = SummaryWriter(str(folder))

    def sink(event: Event) -> None:
        if event["event"] == "step":
            for name in STEP_FIELDS:
                if isinstance(event.get(name), int | float):
                    writer.add_scalar(f"train/{name}", event[name], event["step"])
        elif event["event"] == "eval":
            for name, value in event["metrics"].items():
                if isinstance(value, int | float):
                    writer.add_scalar(f"{event['split']}/{name}", value, event["step"])
            writer.flush()
        elif event["event"] == "finished":
            writer.close()

    return sink
