"""Setting a run up, fresh or resumed, and handing it to the runner."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

import torch

from pairclip_fast.config import RunConfig
from pairclip_fast.data.manifest import Manifest, read_manifest
from pairclip_fast.data.places import MANIFEST_NAME, default_folder
from pairclip_fast.errors import CheckpointError, ConfigError, PairclipError, one_line
from pairclip_fast.events import Event, EventLog, fields_of
from pairclip_fast.storage import FolderLock, write_atomic
from pairclip_fast.telemetry.memory_ledger import MemoryLedger
from pairclip_fast.telemetry.tensorboard import tensorboard_sink
from pairclip_fast.telemetry.timing import peak_tflops
from pairclip_fast.train import run_folder
from pairclip_fast.train.checkpoint import CheckpointStore, Snapshot, load
from pairclip_fast.train.compiling import compile_encoder
from pairclip_fast.train.device import choose_device
from pairclip_fast.train.distributed import Processes, local_batch
from pairclip_fast.train.evaluation import FOLDER as EVALUATIONS
from pairclip_fast.train.evaluation import Evaluator
from pairclip_fast.train.planning import TrainingPlan, blocks_of, kernels_of, make_plan, tell_slower_blocks, tell_slower_kernels
from pairclip_fast.train.precision import choose_precision
from pairclip_fast.train.progress import Progress
from pairclip_fast.train.relay import Relay
from pairclip_fast.train.run_folder import Chosen
from pairclip_fast.train.runner import Runner, out_of_memory, result
from pairclip_fast.train.setup import Parts, build_trainee, prepare, run_bank, train_loader
from pairclip_fast.train.signals import STOPPING
from pairclip_fast.train.state import restore

CHECKPOINTS = "checkpoints"


def open_data(folder: Path, config: RunConfig, *, processes: Processes) -> Manifest:
    """The manifest of the data folder to train on.

    Raises:
        DataError: the data folder is damaged.
        ConfigError: there is none, it has fewer training pairs than a batch, or the batch does not divide evenly.
    """
    local_batch(config.train.batch_size, processes=processes, accumulate=config.optimizer.accumulate)
    if not folder.exists():
        command = "pairclip-fast shard" + ("" if folder == default_folder() else f" --out {shlex.quote(str(folder))}")
        raise ConfigError("there is no data folder", where=folder, fix=f"make it with `{command}`")
    manifest = read_manifest(folder)
    count = manifest.splits["train"].count
    if count < config.train.batch_size:
        raise ConfigError(
            "the batch is larger than the training set",
            where="train.batch_size",
            expected=f"at most {count}",
            got=config.train.batch_size,
            fix=f"use --batch-size {max(count // 8, 2)}, or shard more pairs",
        )
    return manifest


def train(
    chosen: Chosen, *, processes: Processes | None = None, text_encoder: str = "auto", events: EventLog | None = None
) -> dict[str, Any]:
    """Train a run to its end, in this process or as one of several.

    Args:
        chosen: Run folder, configuration, data folder; the same in all processes.
        processes: Who takes part; this process alone by default.
        text_encoder: Which encoder embeds the captions if that is still to be done.
        events: Gets every event of the run's log too.

    Raises:
        PairclipError: see `Runner.finish`, `choose_device`, `CheckpointStore.newest`.
    """
    processes = processes or Processes()
    manifest = open_data(chosen.data, chosen.config, processes=processes)
    with contextlib.ExitStack() as stack:
        if processes.is_first:
            stack.enter_context(FolderLock(chosen.folder))
            log = EventLog(chosen.folder / run_folder.EVENTS, attempt=run_folder.next_attempt(chosen.folder))
        else:
            log = EventLog(None, console=False)
        relay = Relay(processes, events=log)
        stack.callback(log.close)
        if events is not None:
            log.subscribe(forward_to(events))
        try:
            with processes.losses_told():
                try:
                    runner = set_up(chosen, manifest=manifest, relay=relay, text_encoder=text_encoder, stack=stack, events=log)
                except torch.OutOfMemoryError as error:
                    raise out_of_memory(error, config=chosen.config, where="before the first step") from error
                return runner.finish()
        except Exception as error:
            tell_failure(error, events=log)
            raise


def tell_failure(error: Exception, *, events: EventLog) -> None:
    """Why a run ends here, for the report; the command line says it. A stop by a signal is no failure, and its end is on record."""
    expected = isinstance(error, PairclipError)
    if expected:
        events.emit("note", message=str(error))
    if not isinstance(error, tuple(STOPPING.values())):
        events.emit("finished", reason="failed", error=str(error) if expected else one_line(error))


def set_up(chosen: Chosen, *, manifest: Manifest, relay: Relay, text_encoder: str, stack: contextlib.ExitStack, events: EventLog) -> Runner:
    """Build every part of a run, restore it if it was begun, announce the plan. `stack` closes what is opened."""
    run, config, processes = chosen.folder, chosen.config, relay.processes
    store = CheckpointStore(run / CHECKPOINTS, events=events)
    if processes.is_first:
        store.clean()
        if config.train.tensorboard:
            events.subscribe(tensorboard_sink(run / "tensorboard"))
    parts = open_parts(chosen, manifest=manifest, processes=processes, text_encoder=text_encoder, events=events)
    placement = parts.placement
    memory = MemoryLedger(read=placement.memory_reading, forget_peak=placement.forget_memory_peak)
    trainee = build_trainee(parts)
    memory.note("model")
    loader = train_loader(parts, events=events)
    stack.callback(loader.close)
    evaluator = open_evaluator(parts, events=events)
    if evaluator is not None:
        stack.callback(evaluator.close)

    identity = identify(parts)
    snapshot, where = latest(store, processes=processes) if chosen.resumes else (None, None)
    steps_done = 0
    if snapshot is not None:
        run_folder.refuse_differences(snapshot.state.get("identity", {}), identity, where=where)
        steps_done = Progress.from_json(snapshot.state.get("progress"), where=where).step
    else:
        prepare(parts, trainee, events=events)
    compiled = compile_encoder(
        trainee,
        setting=config.train.compile,
        images=[(parts.micro_batch, *parts.shape_at(phase)) for phase in parts.phases],
        num_captions=parts.bank.num_captions,
        events=events,
    )
    plan = make_plan(parts, trainee, loader=loader.backend, compiled=compiled, steps_done=steps_done)
    in_torch = compiled == "compiled"
    tell_slower_kernels(kernels_of(parts, trainee), events=events)
    tell_slower_blocks(parts, blocks_of(parts, trainee, compiled=in_torch), compiled=in_torch, events=events)
    peak = peak_tflops(placement.device, dtype=parts.precision.dtype, synchronise=placement.synchronise)

    torch.manual_seed(config.train.seed)  # whatever the set-up drew
    progress = Progress()
    if snapshot is not None:
        progress = restore(trainee, snapshot, where=where)
        loader.load_state_dict(snapshot.state["loader"])
    relay.tell()
    write_record(chosen, manifest=manifest, parts=parts, events=events)
    announce(run, plan, identity=identity, progress=progress, peak=peak, events=events)
    return Runner(
        run,
        parts=parts,
        trainee=trainee,
        progress=progress,
        loader=loader,
        evaluator=evaluator,
        store=store,
        plan=plan,
        identity=identity,
        peak=peak,
        memory=memory,
        relay=relay,
        events=events,
    )


def open_parts(chosen: Chosen, *, manifest: Manifest, processes: Processes, text_encoder: str, events: EventLog) -> Parts:
    """Check the run folder against the data, choose device and number format, get the caption bank."""
    run, config = chosen.folder, chosen.config
    if processes.is_first:
        stored = run / MANIFEST_NAME
        if chosen.resumes and stored.exists():
            before, now = ({"data digest": digest} for digest in (read_manifest(run).digest, manifest.digest))
            run_folder.refuse_differences(before, now, where=chosen.data)
        else:
            run_folder.write_config(run, config)
            write_atomic(stored, (chosen.data / MANIFEST_NAME).read_bytes())
            run_folder.write_environment(run, facts=data_facts(chosen, manifest=manifest), events=events)
    placement = choose_device(config.train.device, local_rank=processes.local_rank, events=events)
    placement.configure()
    return Parts(
        config=config,
        data=chosen.data,
        manifest=manifest,
        bank=run_bank(
            run, data=chosen.data, manifest=manifest, config=config, text_encoder=text_encoder, processes=processes, events=events
        ),
        placement=placement,
        precision=choose_precision(placement.device, amp=config.train.amp, events=events),
        processes=processes,
    )


def open_evaluator(parts: Parts, *, events: EventLog) -> Evaluator | None:
    """The evaluator of the val split; None if there is none."""
    if "val" not in parts.manifest.splits:
        events.note("the data folder has no val split: no evaluation, no early stopping; the last weights are the result")
        return None
    return Evaluator(
        parts.data,
        split="val",
        trained_on=parts.manifest,
        bank=parts.bank,
        backend=parts.config.train.loader,
        device=parts.placement.device,
        processes=parts.processes,
        events=events,
        on_bad_record=parts.config.train.on_bad_record,
    )


def identify(parts: Parts) -> dict[str, Any]:
    """What a run is made from, as JSON values; compared when it is resumed."""
    features = hashlib.sha256(parts.bank.text_features.numpy().tobytes()).hexdigest()
    identity: dict[str, Any] = json.loads(
        json.dumps({"config": dataclasses.asdict(parts.config), "data": parts.manifest.digest, "bank": features})
    )
    return identity


def announce(run: Path, plan: TrainingPlan, *, identity: dict[str, Any], progress: Progress, peak: float, events: EventLog) -> None:
    """The `run_started` event, and the plan in words."""
    events.emit("run_started", config=identity["config"], plan=plan.to_json(), resumed_step=progress.step, run=str(run), peak_tflops=peak)
    for line in (f"run folder: {run}", *plan.lines()):
        events.say(line)
    if progress.step:
        events.say(f"continuing after step {progress.step:,}")


def latest(store: CheckpointStore, *, processes: Processes) -> tuple[Snapshot | None, Path | None]:
    """The newest whole checkpoint and where it is; the first process looks for it.

    Raises:
        CheckpointError: there are some and none is whole.
    """
    found = store.newest() if processes.is_first else None
    name = processes.share("" if found is None else found.name)
    return (load(store.folder / name), store.folder / name) if name else (None, None)


def data_facts(chosen: Chosen, *, manifest: Manifest) -> dict[str, Any]:
    """Which data a run uses; a later `--resume` or `eval` finds it by this."""
    return {"data": {"folder": str(chosen.data.resolve()), "digest": manifest.digest}}


def write_record(chosen: Chosen, *, manifest: Manifest, parts: Parts, events: EventLog) -> None:
    """Write down where the run runs, what data it uses, and the fallbacks taken."""
    if parts.processes.is_first:
        facts = data_facts(chosen, manifest=manifest) | {
            "device": f"{parts.placement.device.type} ({parts.placement.description})",
            "precision": f"{parts.precision.name} ({parts.precision.reason})",
            "processes": parts.processes.world_size,
        }
        run_folder.write_environment(chosen.folder, facts=facts, events=events)


def finished_result(run: Path, *, events: EventLog) -> dict[str, Any] | None:
    """The result of a run that has ended, read from its folder; None if there is something left to do."""
    path = CheckpointStore(run / CHECKPOINTS, events=events).newest(quarantine=False)
    if path is None:
        return None
    progress = Progress.from_json(load(path, optimizer=False).state.get("progress"), where=path)
    if progress.finished is None:
        return None
    if progress.best is None:
        return result(run, progress, metrics=None, pflop=None)
    try:
        metrics = json.loads((run / EVALUATIONS / "val.json").read_bytes())
        step = metrics.get("step")
    except FileNotFoundError:
        return None  # stopped between the last epoch and the final evaluation
    except (ValueError, AttributeError) as error:
        raise CheckpointError("the run's evaluation is damaged", where=run / EVALUATIONS / "val.json", got=error) from error
    if step not in (progress.best.step, progress.step):
        return None  # likewise, and somebody had evaluated the run while it was going on
    return result(run, progress, metrics=metrics, pflop=None)


def forward_to(events: EventLog) -> Any:
    """A sink that emits every event again in another log."""

    def sink(event: Event) -> None:
        events.emit(event["event"], **fields_of(event))

    return sink
