"""What a measurement is made on: its device, and what is known of the machine."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from clue_fast.ops import backend

BUSY = 0.3  # load a core above which times say little

_device = torch.device("cpu")
_processor_time = False


def use_device(name: str) -> None:
    """Where the benchmarks put their tensors from now on: "cpu" or "cuda"."""
    global _device
    _device = torch.device(name)


def device() -> torch.device:
    """Where the benchmarks put their tensors."""
    return _device


def on_gpu() -> bool:
    return _device.type == "cuda"


def use_processor_time() -> None:
    """Counts from now on what this process computes, on one thread: for a machine on which much else runs."""
    global _processor_time
    _processor_time = True
    torch.set_num_threads(1)


def seconds() -> float:
    """Of a clock whose differences are what a measurement took."""
    return time.process_time() if _processor_time else time.perf_counter()


def wait() -> None:
    """Until the device has done what it was given: a GPU is behind the calls."""
    if on_gpu():
        torch.cuda.synchronize()


def describe() -> dict[str, object]:
    """Processor, threads, versions, commit and how busy the machine is, ready for JSON."""
    extension = backend.extension()
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "clock": "processor" if _processor_time else "wall",
        "instruction_set": extension.cpu_info()["instruction_set"] if extension else None,
        "compiler": extension.build_info()["compiler"] if extension else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **(gpu() if on_gpu() else {}),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def where(about: Mapping[str, Any]) -> str:
    """Processor, threads and torch of what ``describe`` said; and the clock, if it is of this process alone."""
    clock = ", processor time on a busy machine" if about.get("clock") == "processor" else ""
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)}"
    instructions = f", {about['instruction_set']}" if about.get("instruction_set") else ""
    return f"{about['processor']}{instructions}, {threads}{clock}, torch {about['torch']}"


def gpu() -> dict[str, object]:
    """Driver, CUDA, Triton and Liger, and what the GPU is."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "driver": asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "triton": version_of("triton"),
        "liger": version_of("liger-kernel"),
    }


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def asked(*command: str) -> str | None:
    """The first line that a command prints, if it is there."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def multiplies_bfloat16() -> bool:
    """Whether the device has products of bfloat16, without which a pass over a model takes many times as long."""
    return on_gpu() or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def keep_memory() -> None:
    """Has glibc give nothing back: new pages for every output took 13 ms of 16 and came and went by chance."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def use_all_cores() -> None:
    """One thread a core, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(os.cpu_count() or 1)


def warning() -> str | None:
    """A line about a busy machine, if it is one."""
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if load < BUSY * cores:
        return None
    return f"other work runs here (load {load:.1f} on {cores} cores): ratios hold, times are those of a busy machine"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The commit, and whether anything else than results and pages differs from it."""
    if given := os.environ.get("CLUE_FAST_COMMIT"):
        return given
    commit = asked("git", "rev-parse", "--short", "HEAD")
    if commit is None:
        return None
    written = (":(top,exclude)bench/results", ":(top,exclude)docs")
    changed = asked("git", "status", "--porcelain", "--untracked-files=no", "--", ":(top)", *written)
    return f"{commit}-dirty" if changed else commit
