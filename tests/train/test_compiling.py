"""`torch.compile`: where it is left out, and what is left of it when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_step import CAPTIONS, make_batch, make_trainee, parameters

from pairclip_fast.events import EventLog
from pairclip_fast.train import compiling
from pairclip_fast.train.loop import train_step


def test_compiling_that_fails_falls_back_to_eager_and_leaves_no_trace(monkeypatch: pytest.MonkeyPatch, events: EventLog) -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    def broken(*_: object, **__: object) -> Any:
        def forward(_images: torch.Tensor) -> torch.Tensor:
            raise InvalidCxxCompiler

        return forward

    monkeypatch.setattr(torch, "compile", broken)
    trainee, twin = make_trainee(), make_trainee()
    random = torch.get_rng_state()
    said = compiling.compile_encoder(trainee, setting="on", images=[(4, 3, 32, 64)], num_captions=CAPTIONS, events=events)
    assert said.startswith("eager")
    assert "InvalidCxxCompiler" in events.fallbacks[0]["reason"]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, parameters(twin)[name]) for name, value in parameters(trainee).items())
    assert all(value.grad is None for value in trainee.module.parameters())
    assert torch.equal(train_step(trainee, make_batch(), step=0).loss, train_step(twin, make_batch(), step=0).loss)


def test_compiling_without_a_compiler(monkeypatch: pytest.MonkeyPatch, events: EventLog, tmp_path: Path) -> None:
    """The real thing: no C++ compiler on the PATH."""
    import torch._inductor.config as inductor

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler"), "compile_threads": 1}):
        said = compiling.compile_encoder(make_trainee(), setting="on", images=[(4, 3, 32, 64)], num_captions=CAPTIONS, events=events)
    assert said == "eager (compiling failed)"
    assert len(events.fallbacks) == 1


def test_compiling_is_left_out_on_a_cpu_unless_asked_for(events: EventLog) -> None:
    for setting in ("auto", "off"):
        trainee = make_trainee()
        encode = trainee.module.encode
        assert (
            compiling.compile_encoder(trainee, setting=setting, images=[(4, 3, 32, 64)], num_captions=CAPTIONS, events=events)[:5]
            == "eager"
        )
        assert trainee.module.encode == encode
    assert events.fallbacks == []


def test_a_failure_of_the_model_itself_is_not_blamed_on_the_compiler(monkeypatch: pytest.MonkeyPatch, events: EventLog) -> None:
    def forward(_images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the model is wrong")

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    trainee = make_trainee()
    trainee.module.encoder.forward = forward  # type: ignore[method-assign]
    trainee.module.encode = forward
    with pytest.raises(RuntimeError, match="the model is wrong"):
        compiling.compile_encoder(trainee, setting="on", images=[(4, 3, 32, 64)], num_captions=CAPTIONS, events=events)
    assert events.fallbacks == []
