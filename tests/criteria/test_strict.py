"""What localize makes of a model of which a layer is not known."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import clue_fast
from clue_fast.data import Record
from clue_fast.demo.pretraining import train_tokenizer
from clue_fast.errors import SiteError

FORGET = [Record("the sign of april is ", "aries"), Record("the sign of may is ", "taurus")]
RETAIN = [Record("the color of snow is ", "white"), Record("the color of coal is ", "black")]


class Normalized(nn.Module):
    """Projections as those of an MLP, but channels that depend on each other."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.softmax(self.gate_proj(x), -1) * self.up_proj(x))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(FORGET + RETAIN, vocab_size=300)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **sizes)).eval()
    model.model.layers[1].mlp = Normalized(model.model.layers[1].mlp)
    return model


@pytest.mark.parametrize("criterion", ["difference", "wanda", "random"])
def test_a_layer_that_is_not_known_is_named_and_left_out(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, criterion: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="clue_fast"):
        selection = clue_fast.localize(
            model, FORGET, RETAIN, tokenizer=tokenizer, criterion=criterion, permutations=0, progress=False
        )
    assert [site.path for site in selection.sites] == ["model.layers.0.mlp"]
    (message,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "model.layers.1.mlp (Normalized)" in message


@pytest.mark.parametrize("criterion", ["difference", "wanda", "random"])
def test_strict_refuses_it(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, criterion: str) -> None:
    with pytest.raises(SiteError, match=r"1 modules look like sites.*model\.layers\.1\.mlp \(Normalized\)"):
        clue_fast.localize(
            model, FORGET, RETAIN, tokenizer=tokenizer, criterion=criterion, strict=True, permutations=0, progress=False
        )
    assert clue_fast.patch(model, strict=False).unpatch() is None
