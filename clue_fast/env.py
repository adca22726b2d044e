"""What clue_fast can use on this machine, and why not the rest."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

from clue_fast.ops import backend as backends
from clue_fast.version import __version__

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "datasets",
    "accelerate",
    "safetensors",
    "peft",
    "networkx",
    "python-sat",
    "matplotlib",
)


def diagnosis() -> str:
    """Returns versions, devices, backends (with the reason where one cannot run) and what each device would use."""
    lines = [f"clue_fast {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    lines += [f"  {name:<14}{_version(name)}" for name in _PACKAGES]
    lines.append("devices")
    lines.append(f"  cpu           {torch.get_num_threads()} threads, {_cpu()}")
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"  cuda:{index}        {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    lines.append("backends")
    for name, reason in backends.available().items():
        lines.append(f"  {name:<14}{'ready' if reason is None else f'not used: {reason}'}")
    lines.append("operators")
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for operator in backends.operators():
        choices = ", ".join(f"{device}: {backends.choose(operator, torch.device(device)).name}" for device in devices)
        lines.append(f"  {operator:<20}{choices}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    extension = backends.extension()
    if extension is None:
        return "no C++ extension"
    return ", ".join(f"{name} {value}" for name, value in extension.cpu_info().items())


if __name__ == "__main__":
    print(diagnosis())
