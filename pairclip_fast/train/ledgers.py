"""The time and the memory of a run, as its events tell them. The runner says what happens; the arithmetic is in `telemetry`."""

from __future__ import annotations

from typing import Any

from pairclip_fast.data.loader import Loader
from pairclip_fast.data.stats import LoaderStats
from pairclip_fast.events import EventLog
from pairclip_fast.telemetry.memory import GIB, host_memory, host_pss
from pairclip_fast.telemetry.memory_ledger import MemoryLedger
from pairclip_fast.telemetry.time_ledger import TimeTotals, lap_cost_s
from pairclip_fast.telemetry.timing import Rates, StepMeter
from pairclip_fast.train.loop import Trainee


class Ledgers:
    """Both ledgers of one attempt.

    Args:
        trainee: Its ledger gets the laps.
        loader: Knows how long its own thread was at work.
        memory: Has seen the model come into being; sees the first epoch.
        counted: GiB per item that can be counted.
        events: Gets the `memory` event, and what NVML would not say.
    """

    def __init__(self, trainee: Trainee, *, loader: Loader, memory: MemoryLedger, counted: dict[str, float], events: EventLog) -> None:
        self._time, self._placement, self._loader, self._events = trainee.ledger, trainee.placement, loader, events
        self._memory, self._counted = memory, {item: round(size * GIB) for item, size in counted.items()}
        self._time.observers.append(memory.note_lap)
        self._meter, self.totals, self._loaded = StepMeter(self._time), TimeTotals(), loader.stats.copy()
        self._nvml = self._placement.nvml(events=events)
        self._told = False
        self.lap, self.count, self.postpone = self._time.lap, self._meter.count, self._meter.postpone

    @property
    def due(self) -> bool:
        """Whether it is time for a `step` event."""
        return self._meter.due

    def begin(self) -> None:
        """The training begins now."""
        self._memory.note("ready")
        self._time.restart()
        self._meter.postpone()

    def read(self) -> Rates:
        """Rates and phases since the last reading; the device must have finished."""
        rates = self._meter.read()
        self.totals.add(rates.time_s)
        return rates

    def loaded(self) -> LoaderStats:
        """What the loader counted since the last call."""
        before, self._loaded = self._loaded, self._loader.stats.copy()
        return self._loaded.since(before)

    def memory(self) -> dict[str, float]:
        """Memory now, by name, in GiB; what is not known is left out."""
        return host_memory() | self._placement.memory() | ({} if self._nvml is None else self._nvml.reading())

    def end_training(self) -> None:
        """The steps of an epoch are done."""
        self._memory.note("training")

    def end_evaluation(self) -> None:
        """So is the evaluation after it; after the first one the memory of the attempt is told."""
        self._memory.note("evaluation")
        self.lap("evaluation")
        if not self._told:
            self._told = True
            pss = host_pss()
            fields = self._memory.to_json(self._counted) | ({} if pss is None else {"pss_gib": pss / GIB})
            self._events.emit("memory", device=self._placement.device.type, **fields)
            self.lap("telemetry")

    def rest(self) -> dict[str, Any]:
        """Where the time since the last reading went, and the share of the whole that measuring took."""
        self._placement.synchronise()
        time_s = self._time.read()
        self.totals.add(time_s)
        return {"time_s": time_s, "telemetry_share": self.overhead()}

    def overhead(self) -> float:
        """Share of the time that measuring took: telling, and the laps."""
        measuring = self.totals.seconds.get("telemetry", 0.0) + self._time.laps * lap_cost_s(self._time)
        return measuring / self.totals.total_s if self.totals.total_s > 0 else 0.0

    def memory_rows(self) -> dict[str, Any]:
        """The memory ledger as far as it has got."""
        return self._memory.to_json(self._counted)

    def close(self) -> None:
        """Let go of the driver."""
        if self._nvml is not None:
            self._nvml.close()
