"""Hugging Face's hub and its local cache: what is already here, whether the hub can be reached, how to fetch.

Being offline must cost next to nothing: the cache is asked first, and the hub is probed once, in a thread that is
abandoned after `PROBE_SECONDS`, because a name server that does not answer ignores every socket timeout.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.text.files import OTHER_WEIGHTS, SAFE_WEIGHTS, missing_files

PROBE_SECONDS = 1.5
PROBE_THREAD = "hub-probe"
DEFAULT_ENDPOINT = "https://huggingface.co"
SMALL_FILES = ("*.json", "*.txt", "*.model", "1_Pooling/*")


def cached_folder(model: str) -> Path | None:
    """The whole snapshot of `model` in the local cache, or None. No network."""
    import huggingface_hub
    from huggingface_hub import constants

    found = huggingface_hub.try_to_load_from_cache(model, "config.json", cache_dir=constants.HF_HUB_CACHE)
    if not isinstance(found, str):
        return None
    folder = Path(found).parent
    return None if missing_files(folder) else folder


def why_unreachable(*, seconds: float = PROBE_SECONDS) -> str | None:
    """Why the hub cannot be used now, within `seconds`; None if it answers.

    Honours HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE, HF_ENDPOINT and the usual proxy variables.
    """
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{variable} is set"
    endpoint = os.environ.get("HF_ENDPOINT", DEFAULT_ENDPOINT).rstrip("/")
    outcome: list[str | None] = []
    thread = threading.Thread(target=lambda: outcome.append(_probe(endpoint, seconds)), name=PROBE_THREAD, daemon=True)
    thread.start()
    thread.join(seconds)
    return outcome[0] if outcome else f"{endpoint} did not answer within {seconds:g} s"


def _probe(endpoint: str, seconds: float) -> str | None:
    import http.client
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=seconds):
            return None
    except urllib.error.HTTPError:
        return None  # An answer, whatever it says: the download will say more.
    except urllib.error.URLError as error:
        return f"{endpoint} cannot be reached: {error.reason}"
    except (OSError, ValueError, http.client.HTTPException, RuntimeError) as error:
        # RuntimeError: interpreters that forbid sockets (sandboxes, test runs) say so this way.
        return f"{endpoint} cannot be reached: {error}"


def download(model: str, *, events: EventLog) -> Path:
    """Fetch the text model `model` into the local cache; safetensors if the repository has them.

    Raises:
        EnvironmentLackingError: the hub refused, the connection failed, or the repository has no such model.
    """
    import huggingface_hub
    from huggingface_hub import constants, errors

    events.note(f"fetching the text encoder {model} from the hub into {constants.HF_HUB_CACHE}")
    try:
        folder = Path(huggingface_hub.snapshot_download(model, allow_patterns=[*SMALL_FILES, SAFE_WEIGHTS[0], "model-*.safetensors"]))
        if not any((folder / name).is_file() for name in SAFE_WEIGHTS):
            huggingface_hub.hf_hub_download(model, OTHER_WEIGHTS)
    except (OSError, ValueError, errors.HfHubHTTPError) as error:
        raise EnvironmentLackingError("fetching the text encoder failed", where=model, got=str(error).splitlines()[0]) from error
    if missing := missing_files(folder):
        raise EnvironmentLackingError(
            "the hub's repository is no text encoder that we can use", where=model, got=f"no {', no '.join(missing)}"
        )
    return folder
