"""The CUDA kernels compile for every generation that is aimed at, and keep to their registers; no GPU is needed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*.cu"))
TARGETS = ["sm_80", "sm_90", "sm_100"]
# 256 threads a block: 64 registers leave room for four blocks on a multiprocessor.
REGISTERS = 64


def compiled(source: Path, target: Path, *options: str) -> str:
    """Compiles to a .cubin or .ptx file; what nvcc says about the kernels."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    command = [
        nvcc,
        "-O3",
        "-std=c++17",
        f"-I{CSRC}",
        *options,
        f"-{target.suffix[1:]}",
        str(source),
        "-o",
        str(target),
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stderr


def usage(report: str) -> list[dict[str, int]]:
    """Registers and bytes of spills of each kernel."""
    fields = {
        "registers": r"Used (\d+) registers",
        "spills": r"(\d+) bytes spill stores",
        "stack": r"(\d+) bytes stack",
    }
    kernels = report.split("Compiling entry function")[1:]
    return [{name: int(re.search(pattern, text)[1]) for name, pattern in fields.items()} for text in kernels]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills(source: Path, target: str, tmp_path: Path) -> None:
    kernels = usage(compiled(source, tmp_path / "kernel.cubin", f"-arch={target}", "-Xptxas", "-v"))
    assert kernels
    for kernel in kernels:
        assert kernel["spills"] == kernel["stack"] == 0 and kernel["registers"] <= REGISTERS


@pytest.mark.slow
def test_spills_are_seen(tmp_path: Path) -> None:
    """A kernel that keeps more values alive than there are registers."""
    source = tmp_path / "spilling.cu"
    source.write_text(
        """__global__ void __launch_bounds__(1024) spilling(float* x) {
             float kept[128], sum = 0;
             #pragma unroll
             for (int i = 0; i < 128; ++i) sum += kept[i] = x[threadIdx.x * 128 + i];
             #pragma unroll
             for (int i = 0; i < 128; ++i) x[threadIdx.x * 128 + i] = kept[i] / sum;
           }"""
    )
    (kernel,) = usage(compiled(source, tmp_path / "kernel.cubin", "-arch=sm_80", "-Xptxas", "-v"))
    assert kernel["spills"] > 0


@pytest.mark.slow
def test_selected_parts_move_16_bytes_at_a_time(tmp_path: Path) -> None:
    """Reads of value, gradient and both moments, writes of value, both moments and float32 rows."""
    target = tmp_path / "kernel.ptx"
    compiled(CSRC / "cuda" / "sparse_optimizer.cu", target, "-arch=compute_80")
    (adamw,) = (text for text in target.read_text().split(".entry")[1:] if "AdamW" in text.partition("(")[0])
    loads, stores = (len(re.findall(rf"{kind}\.global\S*\.v4\.", adamw)) for kind in ("ld", "st"))
    assert loads >= 4 and stores >= 4
