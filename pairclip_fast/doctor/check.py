"""One answer of the doctor."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

from pairclip_fast.errors import PairclipError

Status = Literal["ok", "fallback", "missing"]

REINSTALL = "pip install --force-reinstall . in the checkout"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """What was found about one topic.

    Args:
        topic: For example "loader".
        status: "ok": the best there is; "fallback": works, something better is absent; "missing": training cannot work.
        found: What is there or will be used.
        reason: Why, where that is not plain.
        fix: What to do about it, "" if nothing needs to be done.
    """

    topic: str
    status: Status
    found: str
    reason: str = ""
    fix: str = ""


def attempt(topic: str, probe: Callable[[], Check]) -> Check:
    """The answer of `probe`; a room that cannot even be asked is an answer too."""
    try:
        return probe()
    except PairclipError as error:
        return Check(topic=topic, status="missing", found=error.what, reason=str(error.got or ""), fix=error.fix or "")
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        # Half-installed packages show in all of these: absent modules, unloadable libraries, missing symbols.
        reason = f"{type(error).__name__}: {error}"
        return Check(topic=topic, status="missing", found="cannot be asked", reason=reason, fix=REINSTALL)
