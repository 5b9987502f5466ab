"""Run by `test_losses_distributed.py`: one process alone, then two over gloo, all forked after a single import of torch.

The parent computes nothing itself: autograd refuses to work in a child of a process that has used it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from pairclip_fast.config import LossConfig
from pairclip_fast.evaluate import _gather_rows
from pairclip_fast.losses import ContrastiveLoss

BATCH = 8


def losses(*, rank: int, world: int) -> dict[str, object]:
    """Loss and gradients of this process's share, averaged over the processes as data parallelism does."""
    torch.manual_seed(0)
    bank = F.normalize(torch.randn(12, 6, dtype=torch.float64), dim=-1)
    inputs, ids = torch.randn(BATCH, 5, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 1, 5, 6, 0])
    share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    result: dict[str, object] = {}
    for kind in ("bank", "infonce"):
        torch.manual_seed(1)
        model, loss = nn.Linear(5, 6).double(), ContrastiveLoss(LossConfig(kind=kind), bank=bank).double()  # type: ignore[arg-type]
        value = loss(F.normalize(model(inputs[share]), dim=-1), ids[share])
        value.backward()
        tensors = [value.detach().clone().view(1), model.weight.grad, loss.logit_scale.grad.view(1)]
        for tensor in tensors if world > 1 else []:
            dist.all_reduce(tensor)
            tensor /= world
        result[kind] = torch.cat([tensor.flatten() for tensor in tensors]).tolist()
    return result


def gathered(*, rank: int) -> dict[str, object]:
    """Shares of different sizes and dtypes, put together."""
    size = 3 - rank
    rows = {
        "sample_ids": np.arange(rank * 3, rank * 3 + size),
        "scores": np.full((size, 2), rank, np.float32),
        "wins": np.full(size, bool(rank)),
    }
    return {name: values.tolist() for name, values in _gather_rows(rows).items()}


def child(folder: Path, *, rank: int, world: int) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = losses(rank=rank, world=world)
    if world > 1:
        result["gathered"] = gathered(rank=rank)
        dist.destroy_process_group()
    (folder / f"{world}-{rank}.json").write_text(json.dumps(result))


def main() -> int:
    folder, children = Path(sys.argv[1]), []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        pid = os.fork()
        if pid == 0:
            child(folder, rank=rank, world=world)
            return 0
        children.append(pid)
    return sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in children)


if __name__ == "__main__":
    sys.exit(main())
