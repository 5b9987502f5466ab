"""`torch.compile`: where it is left out, and what is left of it when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import Options
from tiny_step import CAPTIONS, make_batch, make_trainee, parameters
from torch import Tensor

from pairclip_fast.events import EventLog
from pairclip_fast.models.encoder import ImageEncoder
from pairclip_fast.train import compiling
from pairclip_fast.train.commands import run_train
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


def test_memory_that_runs_out_is_not_blamed_on_the_compiler(monkeypatch: pytest.MonkeyPatch, events: EventLog) -> None:
    def exhausted(_images: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", lambda _function, **_: exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        compiling.compile_encoder(make_trainee(), setting="on", images=[(4, 3, 32, 64)], num_captions=CAPTIONS, events=events)
    assert events.fallbacks == []


def test_recomputed_batch_norms_are_not_compiled(events: EventLog) -> None:
    """The second pass through them needs a context that the compiler does not take."""

    class Encoder(ImageEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm2d(3)

    trainee = make_trainee()
    trainee.module.encoder = Encoder()
    trainee.module.encoder.recompute = True
    said = compiling.compile_encoder(trainee, setting="on", images=[(4, 3, 32, 64)], num_captions=CAPTIONS, events=events)
    assert said == "eager (activations are recomputed)"
    assert "recomputed" in events.fallbacks[0]["reason"]


@pytest.mark.usefixtures("in_a_hurry")
def test_the_plan_of_a_compiled_run_tries_no_size_that_was_not_compiled(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would be one more compilation; and a trial of the original would move its batch statistics."""
    sizes: list[tuple[int, ...]] = []

    def compiled(function: Any, **_: Any) -> Any:
        def watched(images: Tensor) -> Tensor:
            sizes.append(tuple(images.shape))
            result: Tensor = function(images)
            return result

        return watched

    monkeypatch.setattr(torch, "compile", compiled)
    phases = {"train.progressive": [[16, 0.5], [32, 0.5]], "model.architecture": "tile_conv", "model.width": 8}
    run_train(options(phases | {"train.compile": "on", "train.epochs": 1}))
    assert set(sizes) == {(16, 3, 16, 32), (16, 3, 32, 64)}


def test_models_of_one_process_do_not_share_the_limit_of_compilations(monkeypatch: pytest.MonkeyPatch, events: EventLog) -> None:
    """Past the limit torch runs eagerly and says nothing; here it is one, and there are two models."""
    import torch._dynamo.config as dynamo

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 6)

        def forward(self, images: Tensor) -> Tensor:
            features: Tensor = self.linear(images.mean((2, 3)))
            return features

    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> Any:
        graphs[-1] += 1
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **settings: compile_(function, backend=backend, **settings))
    with dynamo.patch(recompile_limit=1):
        for _ in range(2):
            graphs.append(0)
            trainee = make_trainee()
            trainee.module.encoder = Encoder()
            said = compiling.compile_encoder(trainee, setting="on", images=[(4, 3, 32, 64)], num_captions=CAPTIONS, events=events)
            assert said == "compiled", events.fallbacks
    assert min(graphs) >= 1
