"""`auto`'s order, encoders asked for by name, and being offline in under two seconds."""

from __future__ import annotations

import shutil
import socket
import threading
import time
import urllib.request
from pathlib import Path

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.errors
import pytest

from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.text import choice, hub
from pairclip_fast.text.choice import CLIP_MODELS, choose_encoder, find_auto, find_named
from pairclip_fast.text.files import ModelFiles

MINILM = ModelFiles("minilm", "m", Path("m"))


@pytest.fixture(autouse=True)
def _empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No cache, no local folder, no variable, hub offline: whatever the developer's machine has."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("PAIRCLIP_CLIP_FOLDER", "HF_ENDPOINT", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def fill_cache(tmp_path: Path, clip_folder: Path, model: str) -> Path:
    """The layout of the hub's cache."""
    repository = tmp_path / "cache" / f"models--{model.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    return shutil.copytree(clip_folder, repository / "snapshots" / "0123abcd")


def test_auto_takes_clip_from_the_cache(tmp_path: Path, clip_folder: Path, events: EventLog) -> None:
    fill_cache(tmp_path, clip_folder, CLIP_MODELS[1])
    encoder = choose_encoder("auto", events=events, device="cpu")
    assert (encoder.name, encoder.model) == ("clip", CLIP_MODELS[1])
    assert events.fallbacks == []
    fill_cache(tmp_path, clip_folder, CLIP_MODELS[0])
    files = find_auto(events=events)
    assert files is not None
    assert files.model == CLIP_MODELS[0]


def test_auto_takes_clip_from_a_folder_before_the_cache(
    tmp_path: Path, clip_folder: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache(tmp_path, clip_folder, CLIP_MODELS[0])
    shutil.copytree(clip_folder, tmp_path / "clip-vit-base-patch16")
    files = find_auto(events=events)
    assert files is not None
    assert files.folder == Path("clip-vit-base-patch16")
    monkeypatch.setenv("PAIRCLIP_CLIP_FOLDER", str(clip_folder))
    files = find_auto(events=events)
    assert files is not None
    assert files.folder == clip_folder


def test_an_incomplete_cache_counts_as_none(tmp_path: Path, clip_folder: Path, events: EventLog) -> None:
    (fill_cache(tmp_path, clip_folder, CLIP_MODELS[0]) / "model.safetensors").unlink()
    with pytest.raises(EnvironmentLackingError, match="is not here"):
        find_named("clip", events=events)


def test_auto_asks_the_hub_before_minilm(clip_folder: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "why_unreachable", lambda: None)
    monkeypatch.setattr(hub, "download", lambda model, *, events: clip_folder)
    monkeypatch.setattr(choice, "find_minilm", lambda: MINILM)
    files = find_auto(events=events)
    assert files is not None
    assert (files.kind, files.folder) == ("clip", clip_folder)


def test_auto_survives_a_failing_download(events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("connection reset\nmore lines")

    monkeypatch.setattr(hub, "why_unreachable", lambda: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(choice, "find_minilm", lambda: MINILM)
    assert find_auto(events=events) == MINILM
    assert events.fallbacks[0]["chosen"] == "minilm"
    assert "connection reset" in events.fallbacks[0]["reason"]
    with pytest.raises(EnvironmentLackingError, match="fetching"):
        find_named("clip", events=events)


def test_auto_takes_minilm_then_hashed_and_says_why(events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_minilm", lambda: MINILM)
    assert find_auto(events=events) == MINILM
    monkeypatch.setattr(choice, "find_minilm", lambda: None)
    assert choose_encoder("auto", events=events).name == "hashed"
    assert [f["chosen"] for f in events.fallbacks] == ["minilm", "hashed"]
    assert all("HF_HUB_OFFLINE is set" in f["reason"] for f in events.fallbacks)
    assert "not installed" in events.fallbacks[1]["reason"]


@pytest.mark.parametrize("wanted", ["clip", "minilm", "openai/clip-vit-large-patch14", "nobody", "./nowhere", "/nowhere/at all", "a/b/c"])
def test_what_was_asked_for_is_never_replaced(wanted: str, events: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_minilm", lambda: None)
    started = time.monotonic()
    with pytest.raises(EnvironmentLackingError) as caught:
        choose_encoder(wanted, events=events)
    assert time.monotonic() - started < 2
    assert caught.value.exit_code == 5
    for way in ("--text-encoder FOLDER", "hf download", "--text-encoder minilm", "--text-encoder hashed"):
        assert way in str(caught.value)
    assert events.fallbacks == []


def test_hub_ids_come_from_the_cache(tmp_path: Path, clip_folder: Path, events: EventLog) -> None:
    fill_cache(tmp_path, clip_folder, "someone/some-clip")
    files = find_named("someone/some-clip", events=events)
    assert files is not None
    assert (files.kind, files.model) == ("clip", "someone/some-clip")


def test_incomplete_and_foreign_folders_are_named(tmp_path: Path, clip_folder: Path, events: EventLog) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(EnvironmentLackingError, match=r"no config\.json, no model\.safetensors"):
        find_named(str(empty), events=events)
    foreign = shutil.copytree(clip_folder, tmp_path / "foreign")
    (foreign / "config.json").write_text('{"model_type": "siglip", "vision_config": {}}')
    with pytest.raises(EnvironmentLackingError, match="siglip"):
        find_named(str(foreign), events=events)


class TestProbe:
    @pytest.fixture(autouse=True)
    def _online(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)

    @pytest.mark.filterwarnings("ignore:A test tried to use socket")
    def test_blocked_sockets_are_a_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """pytest-socket forbids them here; nothing may escape from the probing thread."""
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        assert "cannot be reached" in str(hub.why_unreachable())

    @pytest.mark.parametrize("where", ["resolve", "connect"])
    def test_silence_is_not_waited_for(self, monkeypatch: pytest.MonkeyPatch, events: EventLog, where: str) -> None:
        """A name server or a host that never answers, and ignores the timeout."""
        released = threading.Event()

        def hang(*_: object, **__: object) -> None:
            released.wait(20)
            raise OSError("given up")

        monkeypatch.setattr(*((socket, "getaddrinfo") if where == "resolve" else (urllib.request, "urlopen")), hang)
        started = time.monotonic()
        with pytest.raises(EnvironmentLackingError, match="did not answer"):
            find_named("clip", events=events)
        assert time.monotonic() - started < 2
        released.set()
        for thread in threading.enumerate():
            if thread.name == hub.PROBE_THREAD:
                thread.join(20)

    def test_refusal_is_quick_and_told(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise urllib.error.URLError(ConnectionRefusedError(111, "Connection refused"))

        monkeypatch.setattr(urllib.request, "urlopen", refuse)
        assert "Connection refused" in str(hub.why_unreachable())

    def test_the_endpoint_is_honoured(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []

        def refuse(request: urllib.request.Request, **_: object) -> None:
            asked.append(request.full_url)
            raise urllib.error.HTTPError(request.full_url, 404, "no", {}, None)  # type: ignore[arg-type]

        monkeypatch.setattr(urllib.request, "urlopen", refuse)
        monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
        assert hub.why_unreachable() is None, "an answer is an answer"
        assert asked == ["https://mirror.example"]
        monkeypatch.setenv("HF_ENDPOINT", "not a url")
        assert "cannot be reached" in str(hub.why_unreachable())

    @pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
    def test_offline_variables_ask_nobody(self, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("the network was asked")

        monkeypatch.setattr(urllib.request, "urlopen", refuse)
        monkeypatch.setenv(variable, "true")
        assert hub.why_unreachable() == f"{variable} is set"


def test_download_takes_safetensors_and_falls_back_to_bin(
    tmp_path: Path, clip_folder: Path, events: EventLog, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = shutil.copytree(clip_folder, tmp_path / "fetched")
    asked: list[str] = []

    def fetch_weights(model: str, name: str) -> None:
        asked.append(name)
        (fetched / name).write_bytes(b"")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda model, *, allow_patterns: str(fetched))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch_weights)
    assert hub.download("a/b", events=events) == fetched
    assert asked == []
    assert "a/b" in notes[0]
    (fetched / "model.safetensors").unlink()
    assert hub.download("a/b", events=events) == fetched
    assert asked == ["pytorch_model.bin"]
    (fetched / "config.json").unlink()
    with pytest.raises(EnvironmentLackingError, match=r"no config\.json"):
        hub.download("a/b", events=events)
