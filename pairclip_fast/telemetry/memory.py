"""Host memory of this process, in GiB."""

from __future__ import annotations

import resource
import sys

GIB = 2**30


def host_memory() -> dict[str, float]:
    """Resident memory now and at its peak.

    Returns:
        `rss_gib` and `peak_rss_gib`.
    """
    import psutil

    unit = 1 if sys.platform == "darwin" else 1024  # getrusage counts bytes on macOS, KiB on Linux
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    rss = psutil.Process().memory_info().rss
    return {"rss_gib": rss / GIB, "peak_rss_gib": max(rss, peak) / GIB}
