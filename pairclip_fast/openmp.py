"""Let torch's idle OpenMP threads look out for work for a moment, and then sleep.

GNU OpenMP, which torch uses, spins for some milliseconds after every parallel region in case the next one comes soon. Where something
else wants the cores too (another process, the loader's workers, our own C++ threads) the spinning takes them away from those who
work, and each barrier then costs a turn of the scheduler: steps became several times slower. Going to sleep at once has its price
as well: a training step has many short regions, and waking a thread takes longer than some of them. So threads spin for
about as long as waking takes (`benchmarks/competition.py`: a step alone and beside busy programs).

It is a decision for a whole process, and is read when torch is loaded, so the programs make it (the command line, the
benchmarks), not the library.
"""

from __future__ import annotations

import os
import sys

SETTINGS = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "2000"}
"""Sleep, says OpenMP's own variable. GNU's takes a number before it: looks at a flag, some 20 microseconds (libgomp's estimate)."""
CHOICES = (*SETTINGS, "KMP_BLOCKTIME")
"""With one of these set, the user has chosen."""


def spin_briefly() -> bool:
    """Ask OpenMP to spin for a moment at barriers before it sleeps. Call it before torch is imported.

    Returns:
        Whether it will be heard: not when the environment chooses already, nor when torch is there.
    """
    if "torch" in sys.modules or any(name in os.environ for name in CHOICES):
        return False
    os.environ |= SETTINGS
    return True
