"""What the other processes of a run have met, told by the first one, which alone has a log and a console."""

from __future__ import annotations

from pairclip_fast.data.bad_records import bad_record_in_words
from pairclip_fast.events import Event, EventLog, fields_of
from pairclip_fast.train.distributed import Processes

TOLD = ("bad_record", "fallback")
"""Events that may differ from process to process; of all others the first one's are everybody's."""


class Relay:
    """Carries events to the first process at the places where all meet.

    Args:
        processes: Who takes part.
        events: This process's log; what it records from now on is carried.
    """

    def __init__(self, processes: Processes, *, events: EventLog) -> None:
        self.processes, self._events = processes, events
        self._met: list[Event] = []
        self._told: set[tuple[str, ...]] = set()
        events.subscribe(self._keep)

    def _keep(self, event: Event) -> None:
        if event["event"] not in TOLD:
            return
        if self.processes.is_first:
            self._told.add(_subject(event))
        else:
            self._met.append(event)

    def tell(self) -> None:
        """Tell what has been met since the last call; every process calls it."""
        met, self._met = self._met, []
        for rank, events in enumerate(self.processes.gather(met)):
            for event in events:
                if self.processes.is_first and _subject(event) not in self._told:
                    self._told.add(_subject(event))
                    self._record(event, rank=rank)

    def _record(self, event: Event, *, rank: int) -> None:
        if event["event"] == "fallback":
            self._events.fallback(event["what"], chosen=event["chosen"], reason=f"process {rank}: {event['reason']}")
        else:
            self._events.emit("bad_record", process=rank, **fields_of(event))
            self._events.say(f"process {rank}: {bad_record_in_words(event)}")


def _subject(event: Event) -> tuple[str, ...]:
    """Of two events with the same one, the second says nothing new."""
    return tuple(event[name] for name in (("what", "chosen", "reason") if event["event"] == "fallback" else ("shard", "key")))
