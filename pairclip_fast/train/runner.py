"""The course of a run: epochs, evaluations, checkpoints, signals, and what is told about them.

`Runner` holds a run that was set up (see `starting`) and carries it to its end. Everything that decides the result is in
the trainee and in `Progress`; the rest of this file tells and saves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

import torch

from pairclip_fast.config import RunConfig
from pairclip_fast.data.loader import Batch, Loader
from pairclip_fast.data.stats import LoaderStats, starvation
from pairclip_fast.errors import EnvironmentLackingError, StorageError
from pairclip_fast.events import EventLog
from pairclip_fast.telemetry.memory_ledger import MemoryLedger
from pairclip_fast.train.checkpoint import CheckpointStore, checkpoint_name, checkpoint_step, load
from pairclip_fast.train.distributed import AGREEMENT_STEPS, LostProcessError
from pairclip_fast.train.evaluation import Evaluator, scalars, write_evaluation
from pairclip_fast.train.ledgers import Ledgers
from pairclip_fast.train.loop import StepResult, Trainee, train_epoch
from pairclip_fast.train.planning import TrainingPlan
from pairclip_fast.train.progress import Progress
from pairclip_fast.train.relay import Relay
from pairclip_fast.train.setup import Parts
from pairclip_fast.train.signals import STOPPING, SignalFlags
from pairclip_fast.train.state import capture, evaluated_weights, load_module
from pairclip_fast.train.telling import ConsoleLine, resume_command


class Runner:
    """One run.

    Args:
        run: Run folder.
        parts: Configuration, data, bank, placement.
        trainee: Model and optimizer, at the state of `progress`.
        progress: Where the run stands.
        loader: Training batches, at the position of `progress`.
        evaluator: Held-out pairs; None without a val split.
        store: Checkpoints.
        plan: What was announced.
        identity: What the run was made from; goes into every checkpoint.
        peak: Practical peak of the device in TFLOP/s.
        memory: Has seen the model come into being; sees the first epoch.
        events: The run's log.
    """

    def __init__(
        self,
        run: Path,
        *,
        parts: Parts,
        trainee: Trainee,
        progress: Progress,
        loader: Loader,
        evaluator: Evaluator | None,
        store: CheckpointStore,
        plan: TrainingPlan,
        identity: dict[str, Any],
        peak: float,
        memory: MemoryLedger,
        relay: Relay,
        events: EventLog,
    ) -> None:
        self.run, self.parts, self.trainee, self.progress, self.loader = run, parts, trainee, progress, loader
        self.evaluator, self.store, self.plan, self.identity, self.peak, self.events = evaluator, store, plan, identity, peak, events
        self.relay, self.signals = relay, SignalFlags()
        self.failed_save: StorageError | None = None
        self.evaluation_s = 0.0
        self._said_starved = False
        self.ledgers = Ledgers(trainee, loader=loader, memory=memory, counted=plan.memory_gib, events=events)
        self._line = ConsoleLine(events)
        self._loss_sum = torch.zeros((), device=parts.placement.device)
        self._loss_count = 0
        self._scale = trainee.scaler.get_scale()
        self._clock = self._saved_at = time.monotonic()

    def finish(self) -> dict[str, Any]:
        """Train to the end; the result as plain values.

        Raises:
            InterruptedRunError, TerminatedRunError: a signal asked to stop; everything is saved.
            NumericsError: a loss or gradient is not finite; the last checkpoint is untouched.
            EnvironmentLackingError: the device ran out of memory, or another process has ended; everything is saved, unless the
                optimizer was at work: then the last checkpoint is untouched.
            StorageError: the last save failed.
        """
        progress, steps = self.progress, self.parts.steps_per_epoch
        with self.signals, contextlib.closing(self.ledgers):
            self._clock = self._saved_at = time.monotonic()
            self.ledgers.begin()
            while progress.finished is None:
                if progress.step < (progress.epoch + 1) * steps and self._train_epoch():
                    self._leave()
                self._end_epoch()
            return self._end()

    def _train_epoch(self) -> bool:
        try:
            with self.parts.processes.losses_told():
                return train_epoch(self.trainee, self.loader, self.progress, after_step=self._after_step)
        except (torch.OutOfMemoryError, LostProcessError) as error:
            self.trainee.optimizer.zero_grad(set_to_none=True)
            if self.trainee.is_whole:
                self.save()
            if isinstance(error, LostProcessError):
                raise
            raise out_of_memory(error, config=self.parts.config, where=f"step {self.progress.step}") from error

    def _after_step(self, batch: Batch, result: StepResult) -> bool:
        """What follows a step: look at the guard, tell, save, stop. True to stop."""
        progress = self.progress
        self.ledgers.count(len(batch.sample_ids) * self.parts.processes.world_size)
        self._loss_sum += result.loss
        self._loss_count += 1
        ends_epoch = progress.step % self.parts.steps_per_epoch == 0
        # One of several processes that raised alone would leave the others waiting for it.
        tells, alone = self.ledgers.due or ends_epoch, self.parts.processes.world_size == 1
        if progress.step % self.parts.placement.guard_steps == 0 or ends_epoch or (tells and alone):
            self.trainee.guard.check(events=self.events)
        if tells:
            self._tell(result)
        if self.signals.take_save():
            self.events.emit("signal", name="SIGUSR1", step=progress.step)
            self.save()
        elif time.monotonic() - self._saved_at >= 60 * self.parts.config.train.save_minutes:
            self.save()
        if self.parts.processes.world_size == 1 or progress.step % AGREEMENT_STEPS == 0:
            self.signals.stop = self.parts.processes.agree(self.signals.stop)
            return self.signals.stop != 0
        return False

    def _tell(self, result: StepResult) -> None:
        """One `step` event and one line on the console; waits for the device."""
        self.ledgers.lap("other")
        self.parts.placement.synchronise()
        rates, loaded, progress, work = self.ledgers.read(), self.ledgers.loaded(), self.progress, self.plan.work
        done, left = work.until(progress.step), max(work.until(self.parts.total_steps) - work.until(progress.step), 0.0)
        evaluations = self.parts.config.train.epochs - progress.epoch + 1
        tflops = rates.pairs_per_second * work.at(progress.step - 1) / 1e12
        eta = left / tflops / 1e12 + evaluations * self.evaluation_s if tflops else None
        fields = {
            "step": progress.step,
            "epoch": (progress.step - 1) // self.parts.steps_per_epoch,
            "samples_seen": progress.samples_seen,
            "loss": float(self._loss_sum) / self._loss_count,
            "lr": self.trainee.schedule(progress.step - 1),
            "logit_scale": self.trainee.module.logit_scale,
            "grad_norm": float(result.grad_norm),
            "pairs_per_second": rates.pairs_per_second,
            "tflops": tflops,
            "peak_share": tflops / self.peak / self.parts.processes.world_size,
            "data_wait_fraction": rates.data_wait_fraction,
            "pflop": done / 1e15,
            "eta_s": eta,
            "time_s": rates.time_s,
            "fill_s": loaded.fill_s,
            "memory": self.ledgers.memory(),
        }
        self._loss_sum = torch.zeros_like(self._loss_sum)
        self._loss_count = 0
        self.events.emit("step", **fields)
        # What counts is the device's time between two steps: on CUDA the host runs ahead, and waits for batches that nobody misses yet.
        self._judge_loader(dataclasses.replace(loaded, wait_s=rates.time_s.get("wait", 0.0)), seconds=rates.seconds)
        scale, self._scale = self._scale, self.trainee.scaler.get_scale()
        if self._scale < scale:
            self.events.note(f"fp16 overflow: loss scale lowered from {scale:g} to {self._scale:g}", scale=self._scale)
        self._line.say(fields, total_steps=self.parts.total_steps, epochs=self.parts.config.train.epochs)
        self.ledgers.lap("telemetry")

    def _judge_loader(self, loaded: LoaderStats, *, seconds: float) -> None:
        """Say once if the training waits for data, and for what."""
        verdict = starvation(loaded, seconds=seconds)
        if verdict is not None and not self._said_starved:
            self._said_starved = True
            self.events.note(verdict, step=self.progress.step, loader=loaded.to_json())

    def save(self) -> None:
        """Write a checkpoint. A disk that fails does not end the training; the next save point tries again."""
        self.ledgers.lap("other")
        self._save()
        self.ledgers.lap("checkpoint")

    def _save(self) -> None:
        if self.parts.processes.world_size == 1:
            self.trainee.guard.check(events=self.events)
        elif self.trainee.guard.tripped:  # told at a step that all processes have in common
            return
        self._account()
        self._saved_at = time.monotonic()
        if not self.parts.processes.is_first:
            return
        progress, size, steps = self.progress, self.parts.config.train.batch_size, self.parts.steps_per_epoch
        # The loader may be a batch ahead if a step failed: the position is that of the last finished step.
        position: dict[str, int | str] = {"epoch": progress.step // steps, "cursor": progress.step % steps * size}
        snapshot = capture(self.trainee, progress, identity=self.identity, loader=self.loader.state_dict() | position)
        best = progress.best.checkpoint if progress.best is not None else None
        try:
            path = self.store.save_or_make_room(snapshot, step=progress.step, best=best)
        except StorageError as error:
            self.failed_save = error
            self.events.note(f"the checkpoint of step {progress.step} could not be saved; training goes on", reason=str(error))
            return
        self.failed_save = None
        self.events.emit("checkpoint", step=progress.step, path=str(path.relative_to(self.run)))

    def _end_epoch(self) -> None:
        """Evaluate, remember the best, decide whether to go on, save."""
        progress, train = self.progress, self.parts.config.train
        progress.epoch += 1
        self.ledgers.lap("other")
        self.ledgers.end_training()
        metrics = self._evaluate()
        self.relay.tell()
        self.ledgers.end_evaluation()
        best = metrics is not None and progress.take_in(metrics, checkpoint=checkpoint_name(progress.step))
        if metrics is not None:
            cost = {"step": progress.step, "epoch": progress.epoch - 1, "pflop": self.plan.work.until(progress.step) / 1e15}
            self.events.emit("eval", **cost, split="val", metrics=metrics, best=best)
            self._line.say_evaluation(metrics, epoch=progress.epoch, best=best)
        if progress.epoch >= train.epochs:
            progress.finished = "epochs"
        elif train.patience and progress.stale >= train.patience:
            progress.finished = "early_stop"
        self.save()
        self.ledgers.postpone()
        self.signals.stop = self.parts.processes.agree(self.signals.stop)
        if self.signals.stop and progress.finished is None:
            self._leave()

    def _evaluate(self) -> dict[str, Any] | None:
        """Metrics of the current weights on the val split, the same in all processes; None without that split."""
        if self.evaluator is None:
            return None
        started = time.monotonic()
        self.parts.placement.give_back()  # or the peak would be that of the training plus that of the evaluation
        metrics = scalars(self.evaluator(self.trainee.evaluated).metrics)
        self.evaluation_s = time.monotonic() - started
        return metrics

    def _leave(self) -> None:
        """Stop on a signal: save, say how to go on, raise."""
        self.trainee.guard.check(events=self.events)  # all processes are here
        name = signal.Signals(self.signals.stop).name
        self.events.emit("signal", name=name, step=self.progress.step)
        if self.store.names()[:1] != [checkpoint_name(self.progress.step)]:
            self.save()
        if self.failed_save is not None:
            raise self.failed_save
        self.events.emit("finished", step=self.progress.step, reason="interrupted", best=self._best(), **self._totals())
        raise STOPPING[self.signals.stop](
            f"stopped by {name}; everything is saved",
            where=f"step {self.progress.step} of {self.parts.total_steps}",
            fix=f"continue with: {resume_command(self.run)}",
        )

    def _end(self) -> dict[str, Any]:
        """Evaluate the best weights once more, with all arrays, and tell the result."""
        progress, metrics = self.progress, None
        if self.evaluator is not None:
            module, step = self.trainee.evaluated, progress.step
            if progress.best is not None and progress.best.step != progress.step:
                path = self.store.whole(progress.best.checkpoint) or self.store.newest(quarantine=False)
                if path is not None:
                    load_module(module, evaluated_weights(load(path, optimizer=False).model), where=path)
                    step = checkpoint_step(path.name)
            evaluation = self.evaluator.final(module, step=step)
            if self.parts.processes.is_first:
                write_evaluation(self.run, evaluation, name=self.evaluator.name)
            metrics = evaluation.metrics
        self.ledgers.lap("evaluation")
        self._account()
        totals = self._totals()
        self.events.emit("finished", step=progress.step, reason=progress.finished, best=self._best(), **totals)
        self._line.say_ledgers(self.ledgers.totals, overhead=totals["telemetry_share"], memory=self.ledgers.memory_rows())
        if self.failed_save is not None:
            raise self.failed_save
        return result(self.run, progress, metrics=metrics, pflop=totals["pflop"])

    def _account(self) -> None:
        """Add the time since the last call to the run's."""
        now = time.monotonic()
        self.progress.seconds += now - self._clock
        self._clock = now

    def _totals(self) -> dict[str, Any]:
        """Of the run: time and work; of the time since the last `step` event: where it went."""
        pflop = self.plan.work.until(self.progress.step) / 1e15
        return {"seconds": self.progress.seconds, "pflop": pflop, **self.ledgers.rest()}

    def _best(self) -> dict[str, Any] | None:
        best = self.progress.best
        return None if best is None else {"step": best.step, "epoch": best.epoch, **best.metrics}


def out_of_memory(error: torch.OutOfMemoryError, *, config: RunConfig, where: str) -> EnvironmentLackingError:
    """Torch's error as one that says what to do."""
    fix = f"start again with --batch-size {config.train.batch_size // 2}, or optimizer.accumulate = {2 * config.optimizer.accumulate}"
    return EnvironmentLackingError("the device ran out of memory", where=where, got=error, fix=fix)


def result(run: Path, progress: Progress, *, metrics: dict[str, Any] | None, pflop: float | None) -> dict[str, Any]:
    """What `train` returns and prints."""
    best = progress.best
    return {
        "run": str(run),
        "reason": progress.finished,
        "steps": progress.step,
        "epochs": progress.epoch,
        "samples_seen": progress.samples_seen,
        "seconds": progress.seconds,
        "pflop": pflop,
        "best": None if best is None else {"step": best.step, "epoch": best.epoch, "checkpoint": best.checkpoint},
        "metrics": metrics,
    }
