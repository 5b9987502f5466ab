"""The whole state of a training as tensors and JSON values, and back: what makes a resumed run equal to an uninterrupted one.

`model.safetensors` holds the trained weights under `module.` and the averaged ones under `ema.`; `optimizer.safetensors`
the moments per parameter name and the states of torch's generators. Names and shapes must match exactly on the way back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pairclip_fast.errors import CheckpointError
from pairclip_fast.train.checkpoint import Snapshot
from pairclip_fast.train.loop import Trainee
from pairclip_fast.train.progress import Progress

MODULE, EMA, GENERATOR = "module.", "ema.", "generator."
ADAM_STATE, MUON_STATE = ("step", "exp_avg", "exp_avg_sq"), ("momentum",)
NAMES_SHOWN = 8


def capture(trainee: Trainee, progress: Progress, *, identity: dict[str, Any], loader: dict[str, int | str]) -> Snapshot:
    """Everything that continuing needs.

    Args:
        trainee: Model, optimizer, scaler.
        progress: Counters.
        identity: What the run was made from (configuration, digests); compared on resume.
        loader: The loader's state at this step.
    """
    optimizer = {f"{name}/{key}": value for name, state in _moments(trainee).items() for key, value in state.items()}
    generators = {f"{GENERATOR}{name}": value for name, value in trainee.placement.generator_states().items()}
    state = {"progress": progress.to_json(), "identity": identity, "loader": loader, "scaler": trainee.scaler.state_dict()}
    return Snapshot(model=model_tensors(trainee), optimizer=optimizer | generators, state=state)


def model_tensors(trainee: Trainee) -> dict[str, Tensor]:
    """Trained and averaged weights by name."""
    tensors = {f"{MODULE}{name}": value for name, value in trainee.module.state_dict().items()}
    if trainee.ema is not None:
        tensors |= {f"{EMA}{name}": value for name, value in trainee.ema.module.state_dict().items()}
    return tensors


def restore(trainee: Trainee, snapshot: Snapshot, *, where: object) -> Progress:
    """Put a snapshot back into a trainee that was built from the same configuration.

    Raises:
        CheckpointError: names or shapes differ, or the state is malformed.
    """
    load_weights(model_tensors(trainee), snapshot.model, where=where)
    generators = {name.removeprefix(GENERATOR): value for name, value in snapshot.optimizer.items() if name.startswith(GENERATOR)}
    moments = {name: value for name, value in snapshot.optimizer.items() if not name.startswith(GENERATOR)}
    _restore_moments(trainee, moments, where=where)
    try:
        trainee.placement.set_generator_states(generators)
        if trainee.scaler.is_enabled():
            trainee.scaler.load_state_dict(snapshot.state["scaler"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError("the checkpoint's generator or scaler state is malformed", where=where, got=error) from error
    return Progress.from_json(snapshot.state.get("progress"), where=where)


def evaluated_weights(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a checkpoint's model tensors those that evaluations use, under the names of the module: averaged ones if there are any."""
    prefix = EMA if any(name.startswith(EMA) for name in tensors) else MODULE
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def load_module(module: nn.Module, tensors: dict[str, Tensor], *, where: object) -> None:
    """Copy weights into a module.

    Raises:
        CheckpointError: names or shapes differ.
    """
    load_weights(dict(module.state_dict()), tensors, where=where)


@torch.no_grad()
def load_weights(targets: dict[str, Tensor], sources: dict[str, Tensor], *, where: object) -> None:
    """Copy `sources` into `targets`, in place, whatever their device and memory layout.

    Raises:
        CheckpointError: names, shapes or dtypes differ; the message names them.
    """
    check_names(targets, sources, where=where)
    for name, target in targets.items():
        target.copy_(sources[name])


def check_names(expected: dict[str, Tensor], found: dict[str, Tensor], *, where: object) -> None:
    """Raise a `CheckpointError` that names every kind of difference between two sets of tensors."""
    problems = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "of another shape or type": [
            f"{name} {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
            for name in sorted(expected.keys() & found.keys())
            if found[name].shape != expected[name].shape or found[name].dtype != expected[name].dtype
        ],
    }
    if any(problems.values()):
        got = "; ".join(f"{kind}: {', '.join(names[:NAMES_SHOWN])} ({len(names)})" for kind, names in problems.items() if names)
        raise CheckpointError("the checkpoint is of another model", where=where, got=got, fix="resume with the run's own configuration")


def _trained(trainee: Trainee) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in trainee.module.named_parameters() if parameter.requires_grad}


def _moments(trainee: Trainee) -> dict[str, dict[str, Tensor]]:
    """Optimizer state by parameter name; parameters that had no gradient yet have none."""
    state = trainee.optimizer.state
    return {name: dict(state[parameter]) for name, parameter in _trained(trainee).items() if parameter in state}


def _restore_moments(trainee: Trainee, moments: dict[str, Tensor], *, where: object) -> None:
    """The optimizer's state, laid out in memory as the parameters are (the fused kernel wants that)."""
    parameters = _trained(trainee)
    expected: dict[str, Tensor] = {}
    orthogonal = {id(p) for group in trainee.optimizer.param_groups if group.get("orthogonal") for p in group["params"]}
    for name, parameter in parameters.items():
        keys = MUON_STATE if id(parameter) in orthogonal else ADAM_STATE
        if any(f"{name}/{key}" in moments for key in keys):  # a parameter without a gradient so far has no state
            expected |= {f"{name}/{key}": torch.zeros(()) if key == "step" else parameter.detach() for key in keys}
    check_names(expected, moments, where=where)
    for name, value in moments.items():
        parameter_name, _, key = name.rpartition("/")
        parameter = parameters[parameter_name]
        if key == "step":  # fused kernels keep it beside the parameter, the others on the CPU
            device = parameter.device if trainee.optimizer.defaults.get("fused") else torch.device("cpu")
            trainee.optimizer.state[parameter][key] = value.to(device, copy=True)
        else:
            trainee.optimizer.state[parameter][key] = torch.empty_like(parameter, requires_grad=False).copy_(value)
