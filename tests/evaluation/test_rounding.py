"""Rounded weights: the grid by loops over single numbers, which weights are on it, and that all come back."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from clue_fast.errors import DataError, SettingError
from clue_fast.evaluation.rounding import rounded, rounding


def by_loops(weight: list[list[float]], bits: int, group: int) -> list[list[float]]:
    """Number by number, in Python: the largest of a group is the end of the grid."""
    most = 2 ** (bits - 1) - 1
    found = []
    for row in weight:
        new = []
        for start in range(0, len(row), group):
            part = row[start : start + group]
            scale = max(abs(number) for number in part) / most
            new += [round(number / scale) * scale if scale else 0.0 for number in part]
        found.append(new)
    return found


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 3), (4, 128), (2, 5)])
def test_equals_loops(bits: int, group: int | None) -> None:
    weight = torch.randn(6, 11, generator=torch.Generator().manual_seed(1))
    weight[2] = 0.0
    weight[4, 3:6] = 0.0  # a whole group of three
    kept = weight.clone()
    expected = torch.tensor(by_loops(weight.double().tolist(), bits, group or 11)).float()
    found = rounded(weight, bits, group)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(rounded(weight.T, bits, group, input_dim=0), expected.T, rtol=1e-6, atol=0.0)
    assert torch.equal(weight, kept)
    assert all(len(row.unique()) <= 2**bits - 1 for row in found) or group is not None


def test_groups_are_those_of_one_output_channel() -> None:
    """A large number spoils the grid of its own group alone."""
    weight = torch.full((2, 64), 0.01)
    weight[0, 0] = 100.0
    found = rounded(weight, 4, 32)
    assert (found[0, 1:32] == 0).all() and (found[0, 32:] != 0).all() and (found[1] != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).to(dtype)
    found = rounded(weight, 4, 4)
    assert found.dtype == dtype
    assert torch.equal(found, rounded(weight.float(), 4, 4).to(dtype))


def families() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    gpt2 = GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=50, n_positions=32, bos_token_id=0, eos_token_id=0)
    mixtral = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=2,
        vocab_size=50,
    )
    return {"transposed weights": GPT2LMHeadModel(gpt2), "stacked experts": MixtralForCausalLM(mixtral)}


@pytest.mark.parametrize("family", ["transposed weights", "stacked experts"])
def test_every_layout(family: str) -> None:
    model = families()[family]
    before = copy.deepcopy(model)
    with rounding(model, 4, 8):
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before.get_parameter(n))}
        if family == "transposed weights":
            own, now = before.transformer.h[0].mlp.c_fc.weight.T, model.transformer.h[0].mlp.c_fc.weight.T
            wanted = {n for n in dict(model.named_parameters()) if n.endswith("weight") and ".h.0." in n}
            wanted -= {n for n in wanted if "ln" in n}
        else:
            experts = "model.layers.0.mlp.experts.gate_up_proj"
            own, now = before.get_parameter(experts)[1], model.get_parameter(experts)[1]
            wanted = {n for n in dict(model.named_parameters()) if "_proj" in n}
        torch.testing.assert_close(now.double(), torch.tensor(by_loops(own.double().tolist(), 4, 8)).double())
        assert wanted <= changed and not {n for n in changed if "norm" in n or "ln" in n or "wte" in n or "embed" in n}
        assert "lm_head.weight" not in changed
    assert all(torch.equal(p, before.get_parameter(n)) for n, p in model.named_parameters())


def test_weights_come_back_bit_for_bit_even_after_an_error(model: LlamaForCausalLM) -> None:
    model = copy.deepcopy(model)
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data[0, 0] = -0.0
    weight.grad = torch.ones_like(weight)
    before = {name: (p.data_ptr(), p.detach().clone().view(torch.int32)) for name, p in model.named_parameters()}
    linear = sum(p.numel() for n, p in model.named_parameters() if "_proj" in n)
    with pytest.raises(KeyboardInterrupt), rounding(model, 4) as number:
        assert number == linear
        raise KeyboardInterrupt
    for name, parameter in model.named_parameters():
        place, bits = before[name]
        assert parameter.data_ptr() == place and torch.equal(parameter.detach().view(torch.int32), bits)
        assert parameter.requires_grad
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_what_makes_no_sense() -> None:
    with pytest.raises(DataError, match="no linear layer"), rounding(nn.Embedding(3, 4), 4):
        pass
    for bits, group in ((1, None), (4, 0)):
        with pytest.raises(SettingError, match="at least 2 bits"):
            rounded(torch.ones(2, 2), bits, group)
