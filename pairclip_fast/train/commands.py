"""`pairclip-fast train` and `pairclip-fast eval`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from pairclip_fast.data.manifest import read_manifest
from pairclip_fast.errors import CheckpointError, ConfigError
from pairclip_fast.events import EventLog
from pairclip_fast.telemetry.timing import words_for_seconds
from pairclip_fast.text.bank import CaptionBank, bank_for
from pairclip_fast.train import run_folder
from pairclip_fast.train.budget import within_budget
from pairclip_fast.train.checkpoint import CheckpointStore, checkpoint_step, load
from pairclip_fast.train.denormals import denormals_as_zeros
from pairclip_fast.train.device import choose_device
from pairclip_fast.train.distributed import Processes, join
from pairclip_fast.train.evaluation import Evaluator, write_evaluation
from pairclip_fast.train.options import EvalOptions, TrainOptions, budget_bytes
from pairclip_fast.train.planning import dry_plan
from pairclip_fast.train.precision import choose_precision
from pairclip_fast.train.progress import Progress
from pairclip_fast.train.run_folder import Chosen
from pairclip_fast.train.setup import BANK, build_module
from pairclip_fast.train.starting import CHECKPOINTS, finished_result, open_data, train
from pairclip_fast.train.state import evaluated_weights, load_module

METRICS = (("top-1", "top1"), ("top-10", "top10"), ("top-100", "top100"), ("left top-1", "left_top1"), ("right top-1", "right_top1"))

ENDINGS = {"epochs": "finished", "early_stop": "stopped early (no better held-out top-1)"}


def run_train(options: TrainOptions, *, events: EventLog | None = None) -> dict[str, Any]:
    """Train as the options say; a run that has ended already only gives its result.

    Args:
        options: The flags.
        events: Gets every event of the run as well.

    Returns:
        run, reason, steps, epochs, samples_seen, seconds, pflop, best, metrics; with `dry_run` the plan.

    Raises:
        PairclipError: the failures of `errors`, and `signals.InterruptedRunError` / `TerminatedRunError`.
    """
    with denormals_as_zeros():
        processes = join()
        try:
            with processes.losses_told():
                chosen, result = agree_on_run(options, processes=processes)
            if result is not None:
                return result
            return train(chosen, processes=processes, text_encoder=options.text_encoder or "auto", events=events)
        finally:
            processes.leave()


def agree_on_run(options: TrainOptions, *, processes: Processes) -> tuple[Chosen, dict[str, Any] | None]:
    """The run that the options mean, as the first process sees it, and its result if there is nothing to train.

    Only one process looks at the run folder: the others might already find what it has written.

    Raises:
        PairclipError: what is wrong with the options; in the other processes, that the first one failed.
    """
    message = ""
    try:
        if processes.is_first:
            chosen = run_folder.choose(options)
            if options.resume and not chosen.resumes:
                EventLog(None).note(f"there is no run in {chosen.folder} to resume: it is started")
            chosen = fitted(chosen, options, processes=processes)
            message = json.dumps({"chosen": chosen.to_json(), "result": result_without_training(options, chosen, processes=processes)})
    finally:
        message = processes.share(message)
    if not message:
        raise ConfigError("the first process could not start", fix="see its message")
    shared = json.loads(message)
    return Chosen.from_json(shared["chosen"]), shared["result"]


def fitted(chosen: Chosen, options: TrainOptions, *, processes: Processes) -> Chosen:
    """The run inside the memory budget, if there is one. A run that was begun keeps what was chosen for it then.

    Raises:
        EnvironmentLackingError: it does not fit.
    """
    budget, console = budget_bytes(options), EventLog(None)
    if budget is None:
        return chosen
    if chosen.resumes:
        console.note("--memory-budget was settled when the run was started: it goes on as it was")
        return chosen
    manifest = open_data(chosen.data, chosen.config, processes=processes)
    if not options.dry_run:  # now, so that the text encoder's memory is in the trials too
        bank_for(chosen.data, manifest, text_encoder=options.text_encoder or "auto", events=console)
    config = within_budget(
        chosen.config, data=chosen.data, manifest=manifest, run=chosen.folder, budget=budget, processes=processes, events=console
    )
    return dataclasses.replace(chosen, config=config)


def result_without_training(options: TrainOptions, chosen: Chosen, *, processes: Processes) -> dict[str, Any] | None:
    """The plan of a dry run, the result of a run that has ended, or None."""
    console = EventLog(None)
    if options.dry_run:
        manifest = open_data(chosen.data, chosen.config, processes=processes)
        plan = dry_plan(chosen.config, data=chosen.data, manifest=manifest, run=chosen.folder, processes=processes, events=console)
        for line in plan.lines():
            console.say(line)
        return {"dry_run": True, "run": str(chosen.folder), "plan": plan.to_json()}
    done = finished_result(chosen.folder, events=console) if chosen.resumes else None
    if done is not None:
        console.say(f"{chosen.folder} is finished ({done['reason']})")
    return done


def run_eval(options: EvalOptions, *, events: EventLog | None = None) -> dict[str, Any]:
    """Evaluate a run's best weights on a split of its own or another data folder, and keep the result in the run folder.

    Returns:
        The metrics of `evaluations/<split>.json`, or of `<split>-<digest>.json` for other data than the run's.

    Raises:
        ConfigError: not a run folder, or no such split.
        CheckpointError: no whole checkpoint, or one of another model.
        DataError: other class names.
    """
    events = events or EventLog(None)
    run = options.run
    config = run_folder.stored_config(run)
    data = options.data or run_folder.recorded_data(run)
    trained_on = read_manifest(run)
    bank = CaptionBank.load(run / BANK, fix="train anew: the run's caption bank is lost")
    placement = choose_device(config.train.device if config.train.device == "cpu" else "auto", events=events)
    placement.configure()
    precision = choose_precision(placement.device, amp=config.train.amp, events=events)
    module = build_module(config, manifest=trained_on, bank=bank, precision=precision, device=placement.device)
    path = best_checkpoint(run, events=events)
    load_module(module, evaluated_weights(load(path, optimizer=False).model), where=path)
    evaluator = Evaluator(
        data,
        split=options.split,
        trained_on=trained_on,
        bank=bank,
        backend="auto",
        device=placement.device,
        processes=Processes(),
        events=events,
    )
    try:
        evaluation = evaluator.final(module, step=checkpoint_step(path.name))
    finally:
        evaluator.close()
    write_evaluation(run, evaluation, name=evaluator.name)
    return dict(evaluation.metrics)


def best_checkpoint(run: Path, *, events: EventLog) -> Path:
    """The checkpoint with the best held-out top-1, as the newest whole one names it; else the newest.

    Raises:
        CheckpointError: there is none.
    """
    store = CheckpointStore(run / CHECKPOINTS, events=events)
    newest = store.newest(quarantine=False)
    if newest is None:
        raise CheckpointError("the run has no checkpoint yet", where=store.folder, fix="continue the training with --resume")
    progress = Progress.from_json(load(newest, optimizer=False).state.get("progress"), where=newest)
    if progress.best is None or progress.best.checkpoint == newest.name:
        return newest
    return store.whole(progress.best.checkpoint) or newest


def render_train(summary: dict[str, Any]) -> str:
    """The result of `train` in words."""
    if summary.get("dry_run"):
        return f"dry run: nothing was written; the run folder would be {summary['run']}"
    steps, epochs, seconds = summary["steps"], summary["epochs"], words_for_seconds(summary["seconds"])
    lines = [f"{ENDINGS[summary['reason']]} after {epochs} {'epoch' if epochs == 1 else 'epochs'}, {steps:,} steps, {seconds}"]
    if summary["metrics"] is not None:
        lines.append(render_eval(summary["metrics"]))
    run = summary["run"]
    return "\n".join([*lines, f"run folder: {run}", f"next: pairclip-fast report --run {run}"])


def render_eval(metrics: dict[str, Any]) -> str:
    """Metrics in words, beside chance."""
    captions = metrics["num_captions"]
    lines = [f"{metrics['split']}: {metrics['num_pairs']:,} pairs, {captions:,} captions"]
    for name, key in METRICS:
        chance = {"top1": 1, "top10": 10, "top100": 100}.get(key)
        ratio = "" if chance is None else f"   {metrics[key] / min(chance / captions, 1.0):,.0f} x chance"
        lines.append(f"  {name:<11} {metrics[key]:7.2%}{ratio}")
    lines.append(f"  {'MRR':<11} {metrics['mrr']:7.4f}   median rank {metrics['median_rank']:,.0f}   swap rate {metrics['swap_rate']:.2%}")
    return "\n".join(lines)
