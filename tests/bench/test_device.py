"""With a device that computes nothing in the place of the GPU: the benchmarks' tensors are all there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bench import interleaved, liger, machine
from bench.interleaved import Case
from bench.ops import (
    bench_channel_statistics,
    bench_conflict_score,
    bench_gated_activation,
    bench_scoring,
    bench_sparse_linear,
    bench_sparse_optimizer,
)
from clue_fast.ops import backend as backends

Launches = dict[str, set[str]]


def devices(argument: Any) -> Iterator[str]:
    if isinstance(argument, Tensor):
        yield argument.device.type
    elif isinstance(argument, (list, tuple)):
        for each in argument:
            yield from devices(each)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Names of the launch functions that were called, with the types of device of their tensors."""
    found: Launches = {}

    def launch(name: str) -> Callable[..., None]:
        return lambda *given: found.setdefault(name, set()).update(devices(given))

    monkeypatch.setattr(backends, "launch", lambda operator, name, device, backend: launch(name))
    monkeypatch.setattr(backends, "launch_for", lambda operator, name, x, backend: launch(name))
    monkeypatch.setattr(machine, "_device", torch.device("meta"))
    monkeypatch.setattr(machine, "on_gpu", lambda: True)
    return found


def run(cases: dict[str, Case], *without: str) -> None:
    for name, case in cases.items():
        if name not in without:
            case()


def test_tensors_are_on_the_device(launches: Launches) -> None:
    dtype = torch.bfloat16
    run(bench_gated_activation.cases("silu", dtype), "compiled")
    run(bench_gated_activation.backward_cases("gelu_tanh", dtype))
    run(bench_channel_statistics.cases(dtype))
    run(bench_channel_statistics.attribution_cases(dtype))
    run(bench_conflict_score.cases("16 sites of 8192", "attribution"))
    for operator in bench_scoring.OPERATORS:
        run(bench_scoring.cases(operator, 1024, dtype))
    assert len(launches) == 7 and set.union(*launches.values()) == {"meta"}


@pytest.mark.parametrize("part", ["rows", "columns"])
def test_numbers_of_the_optimizer_stay_on_the_cpu(launches: Launches, part: str) -> None:
    run(bench_sparse_optimizer.cases(part, torch.bfloat16), "whole", "whole with masters")  # torch's own refuses "meta"
    assert launches == {"sparse_adamw": {"meta", "cpu"}}


@pytest.mark.parametrize("part", ["rows", "columns"])
def test_triton_is_measured_beside_what_is_chosen(
    launches: Launches, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # it knows no "meta"
    cases = bench_sparse_linear.cases(part, torch.bfloat16)
    assert {"selected", "selected, Triton"} < set(cases)
    assert "selected, Triton" in bench_sparse_optimizer.cases(part, torch.float32)
    run(cases)
    assert launches["sparse_linear_backward"] == {"meta"}


def test_a_copy_and_liger_take_part(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(liger, "available", lambda: True)
    monkeypatch.setattr(liger, "gated_activation", lambda gate, up, activation: gate * up)
    cases = bench_gated_activation.cases("silu", torch.bfloat16)
    assert {"eager", "compiled", "hooks", "copy", "liger"} < set(cases)
    cases["liger"]()
    assert "liger" in bench_gated_activation.backward_cases("silu", torch.bfloat16)


def test_a_sample_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it and after it: calls of a GPU return before it is done."""
    happened: list[str] = []
    monkeypatch.setattr(machine, "_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    interleaved._time(lambda: happened.append("call"), 2)
    assert happened == ["wait", "call", "call", "wait"]


def test_liger_is_put_into_one_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
        calls.append(activation)
        return torch.nn.functional.silu(gate) * up

    monkeypatch.setattr(liger, "gated_activation", gated_activation)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 2}
    stock = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).eval()
    patched, tokens = copy.deepcopy(stock), torch.randint(64, (1, 8))
    liger.patch(patched)
    with torch.no_grad():
        assert torch.allclose(patched(tokens).logits, stock(tokens).logits, atol=1e-6)
    assert calls == ["silu", "silu"]
