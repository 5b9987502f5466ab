"""Let torch's idle OpenMP threads sleep instead of spin.

GNU OpenMP, which torch uses, spins after every parallel region in case the next one comes soon. Where something else wants
the cores too (another process, the loader's workers, our own C++ threads) the spinning takes them away from those who work,
and each barrier then costs a turn of the scheduler: steps became several times slower. Sleeping costs some microseconds per
region. It is a decision for a whole process, and is read when torch is loaded, so the programs make it (the command line, the
benchmarks), not the library.
"""

from __future__ import annotations

import os
import sys

VARIABLE = "OMP_WAIT_POLICY"
CHOICES = (VARIABLE, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""With one of these set, the user has chosen."""


def sleep_while_waiting() -> bool:
    """Ask OpenMP to sleep at barriers. Call it before torch is imported.

    Returns:
        Whether it will be heard: not when the environment chooses already, nor when torch is there.
    """
    if "torch" in sys.modules or any(name in os.environ for name in CHOICES):
        return False
    os.environ[VARIABLE] = "PASSIVE"
    return True
