"""Times the package of this checkout against that of another one, in turns.

    python -m bench.two_commits ../before

Each checkout needs its extension built in place. Two processes, one a checkout, take turns: the forward of a model
that records, a training step with 5 % of the units of every layer, and an operator. Medians of the ratios
of neighbouring turns are printed with their intervals; raw seconds are kept in ``bench/results/two_commits.json``.
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
CASES = ("recording forward", "training step", "gated_activation in bfloat16")

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

work = {"recording forward": forward, "training step": step, "gated_activation in bfloat16": activate}
for function in work.values():
    for _ in range(5):
        function()
print("ready", flush=True)
for line in sys.stdin:
    function = work[line.strip()]
    started = time.perf_counter()
    for _ in range(5):
        function()
    print((time.perf_counter() - started) / 5, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    workers: dict[str, Any] = {}
    for name, root in (("before", options.before.resolve()), ("now", here)):
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers[name] = subprocess.Popen([sys.executable, "-c", WORKER], cwd=root, env=environment, **pipes)
        assert workers[name].stdout.readline().strip() == "ready", f"the checkout {root} cannot run"
    samples: dict[str, dict[str, list[float]]] = {}
    for case in CASES:
        samples[case] = {name: [] for name in workers}
        for turn in range(options.rounds):
            for name in list(workers)[:: 1 if turn % 2 else -1]:
                workers[name].stdin.write(f"{case}\n")
                workers[name].stdin.flush()
                samples[case][name].append(float(workers[name].stdout.readline()))
        print(f"{case}: now / before {Result(case, samples[case]).ratio('now', 'before')}", flush=True)
    for worker in workers.values():
        worker.stdin.close()
        worker.wait()
    RESULTS.write_text(json.dumps({"machine": machine.describe(), "seconds": samples}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
