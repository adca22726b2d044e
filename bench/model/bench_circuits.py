"""Time and memory of circuit localization on a CPU, and how both grow with samples, layers and heads.

    pytest bench -k circuits                  a small shape, seconds
    pytest bench -m slow -k "circuits and 1b" Llama-3.2-1B with random weights, 8 + 8 samples of 32 tokens

Each case runs in a process of its own, so that its peak memory is its own. Time is also given as a multiple of one
forward and backward pass over the same samples, which the same process measures.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace

import pytest
import torch
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from bench import machine
from bench.files import ROOT
from clue_fast.criteria.circuit import CorruptedExample, Graph, edge_scores, find_circuits, make_formula, solve
from clue_fast.criteria.circuit.architecture import find_architecture
from clue_fast.data.collator import IGNORED_LABEL

SEED = 0
EDGES = 0.02


@dataclass(frozen=True)
class Case:
    """A shape, and how many samples a data set has."""

    layers: int
    heads: int
    kv_heads: int
    width: int
    units: int
    vocabulary: int
    samples: int = 8
    tokens: int = 32
    steps: int = 0
    dtype: str = "float32"


SHAPES = {
    "small": Case(layers=4, heads=8, kv_heads=2, width=256, units=1024, vocabulary=2048),
    "1b": Case(layers=16, heads=32, kv_heads=8, width=2048, units=8192, vocabulary=128256),
}


def cases(base: Case) -> dict[str, Case]:
    """The base case, and one for each quantity doubled."""
    return {
        "base": base,
        "samples x2": replace(base, samples=2 * base.samples),
        "layers x2": replace(base, layers=2 * base.layers),
        "heads x2": replace(base, heads=2 * base.heads, kv_heads=2 * base.kv_heads),
        "2 steps": replace(base, steps=2),
    }


def measure(case: Case) -> dict[str, float]:
    """Runs one case; seconds, and bytes beyond what the model and one forward and backward pass take."""
    machine.use_all_cores()
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.width,
        intermediate_size=case.units,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.kv_heads,
        tie_word_embeddings=True,
    )
    torch.set_default_dtype(getattr(torch, case.dtype))
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    graph = Graph(find_architecture(model))
    sets = {name: examples(case, seed) for seed, name in enumerate(("forget", "retain"))}
    plain = one_pass(model, sets["forget"])
    weights = peak()
    started = time.perf_counter()
    scores = {
        name: edge_scores(model, graph, own, pad_token_id=0, steps=case.steps, tokens_per_batch=256)
        for name, own in sets.items()
    }
    attribution = time.perf_counter() - started
    circuits = find_circuits(graph, scores, max(1, round(EDGES * int(graph.valid.sum()))))
    solution = solve(make_formula(circuits["forget"], [circuits["retain"]]))
    logic = time.perf_counter() - started - attribution
    return {
        "edges": int(graph.valid.sum()),
        "attribution_s": attribution,
        "logic_s": logic,
        "conflicts": solution.conflicts,
        "forward_backward_s": plain,
        # Two sets in two directions.
        "passes_a_sample_and_direction": attribution / (4 * plain),
        "peak_bytes": peak(),
        "beyond_a_pass_bytes": peak() - weights,
    }


def examples(case: Case, seed: int) -> list[CorruptedExample]:
    """Random tokens, of which the first half differs; the last four are the answer."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(case.samples):
        clean = torch.randint(1, case.vocabulary, (case.tokens,), generator=generator)
        other = torch.randint(1, case.vocabulary, (case.tokens // 2,), generator=generator)
        labels = [IGNORED_LABEL] * (case.tokens - 4) + clean[-4:].tolist()
        made.append(CorruptedExample(clean.tolist(), [*other.tolist(), *clean[case.tokens // 2 :].tolist()], labels))
    return made


def one_pass(model: LlamaForCausalLM, own: list[CorruptedExample]) -> float:
    """Seconds of one forward and backward pass over the activations of all samples; the shortest of three."""
    ids, labels = (torch.tensor([getattr(example, name) for example in own]) for name in ("input_ids", "labels"))
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded, labels=labels, use_cache=False).loss.backward()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("name", cases(SHAPES["small"]))
@pytest.mark.parametrize("shape", ("small", pytest.param("1b", marks=pytest.mark.slow)))
def bench_circuits(benchmark, keep, shape: str, name: str, dtype: str) -> None:
    case = cases(replace(SHAPES[shape], dtype=dtype))[name]
    command = [sys.executable, "-m", "bench.model.bench_circuits", json.dumps(asdict(case))]
    found: dict[str, float] = {}

    def run() -> None:
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=ROOT.parent).stdout
        found.update(json.loads(output.splitlines()[-1]))

    benchmark.group = f"circuits, {shape}, {dtype}"
    benchmark.pedantic(run, rounds=1)
    table = (
        f"circuits, {shape}, {dtype}, {name}: {found['edges']} edges, {found['attribution_s']:.1f} s, "
        f"{found['passes_a_sample_and_direction']:.2f} forward and backward passes a sample and direction, "
        f"logic {found['logic_s']:.2f} s, peak {found['peak_bytes'] / 2**30:.2f} GiB, "
        f"{found['beyond_a_pass_bytes'] / 2**30:.2f} beyond a pass"
    )
    keep({"case": asdict(case), **found}, table, "results", name=name, file=f"circuits_{shape}_{dtype}")


if __name__ == "__main__":
    print(json.dumps(measure(Case(**json.loads(sys.argv[1])))))
