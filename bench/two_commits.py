"""Times the package of this checkout against that of another one, in turns.

    python -m bench.two_commits ../before
    python -m bench.two_commits ../before --cases SGD --output bench/results/sgd_of_two_commits.json

Each checkout needs its extension built in place. Two processes, one a checkout, take turns: the forward of a model
that records, a training step with 5 % of the units of every layer, and operators. Medians of the ratios of neighbouring
turns are printed with their intervals, of the clock and of the processor's time, which other work on the machine
lengthens less; raw seconds of both are kept in ``bench/results/two_commits.json``, or the file that is named.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import machine
from bench.interleaved import Result

RESULTS = Path(__file__).parent / "results" / "two_commits.json"
CASES = (
    "recording forward",
    "training step",
    "gated_activation in bfloat16",
    *(f"SGD, 5% of the {part}, {dtype}" for part in ("rows", "columns") for dtype in ("float32", "bfloat16")),
)

WORKER = """
import copy, sys, time, torch
import clue_fast, clue_fast.ops
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=2048, hidden_size=256, intermediate_size=704, num_hidden_layers=4,
                     num_attention_heads=4, num_key_value_heads=4)
recorded = LlamaForCausalLM(config)
trained = copy.deepcopy(recorded)
ids = torch.randint(0, 2048, (8, 64))
patched = clue_fast.patch(recorded)
selection = clue_fast.select(clue_fast.score(patched.statistics, "random"), fraction=0.05)
sparse = clue_fast.sparsify(trained, selection)
optimizer = clue_fast.SparseAdamW(trained, lr=1e-4, layer_lr=1.0)

def forward():
    with torch.no_grad(), patched.record("forget"):
        recorded(input_ids=ids)

def step():
    trained(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

gate, up = torch.randn(2, 2048, 4096, dtype=torch.bfloat16)

def activate():
    clue_fast.ops.gated_activation(gate, up, "silu")

def sgd(part, dtype):
    dim, count = ("rows", "columns").index(part), 20
    weights = [torch.randn(2816, 1024).mul_(0.02).to(getattr(torch, dtype)) for _ in range(count)]
    size = weights[0].shape[dim]
    indices = [torch.randperm(size)[: round(size * 0.05)].sort().values for _ in weights]
    values = [weight.index_select(dim, index).float() for weight, index in zip(weights, indices)]
    grads, momenta = [torch.randn_like(v) for v in values], [torch.zeros_like(v) for v in values]
    lists = values, grads, momenta, weights, indices, [dim] * count
    numbers = [torch.full((count,), number, dtype=torch.float64) for number in (1e-5, 0.1)]
    return lambda: clue_fast.ops.sparse_sgd_(*lists, *numbers, torch.full((count,), 20), 0.9)

work = {"recording forward": forward, "training step": step, "gated_activation in bfloat16": activate}
print("ready", flush=True)
for line in sys.stdin:
    case = line.strip()
    if case not in work:
        work[case] = sgd(*case.split(", ")[1].split()[-1:], case.split(", ")[2])
    function = work[case]
    started, used = time.perf_counter(), time.process_time()
    for _ in range(5):
        function()
    print((time.perf_counter() - started) / 5, (time.process_time() - used) / 5, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--cases", default="", help="those alone whose names begin with this")
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    workers: dict[str, Any] = {}
    for name, root in (("before", options.before.resolve()), ("now", here)):
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers[name] = subprocess.Popen([sys.executable, "-c", WORKER], cwd=root, env=environment, **pipes)
        assert workers[name].stdout.readline().strip() == "ready", f"the checkout {root} cannot run"
    samples: dict[str, dict[str, dict[str, list[float]]]] = {"seconds": {}, "cpu_seconds": {}}
    for case in (case for case in CASES if case.startswith(options.cases)):
        for kind in samples:
            samples[kind][case] = {name: [] for name in workers}
        for turn in range(-1, options.rounds):  # the first makes what the case needs and warms it up
            for name in list(workers)[:: 1 if turn % 2 else -1]:
                workers[name].stdin.write(f"{case}\n")
                workers[name].stdin.flush()
                taken = map(float, workers[name].stdout.readline().split())
                for kind, seconds in zip(samples, taken, strict=True):
                    if turn >= 0:
                        samples[kind][case][name].append(seconds)
        wall, cpu = (Result(case, kind[case]).ratio("now", "before") for kind in samples.values())
        print(f"{case}: now / before {wall}, processor time {cpu}", flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    commits = {name: commit_of(root) for name, root in (("before", options.before), ("now", here))}
    kept = {"machine": machine.describe(), "commits": commits, **samples}
    options.output.write_text(json.dumps(kept) + "\n", encoding="utf-8")


def commit_of(root: Path) -> str:
    """The commit that a checkout is at."""
    asked = ["git", "-C", str(root), "describe", "--always", "--dirty"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
