"""Which positions predict an answer, by head, against loops over single tokens."""

from __future__ import annotations

import random

import pytest
import torch
import transformers
from torch import nn

from clue_fast.data.collator import HEADS, answer_mask, has_head, head_of, shift_labels
from clue_fast.errors import ObjectiveError
from tests.models.families import SIZES, T5_SIZES

MODELS = {
    "LlamaForCausalLM": ("LlamaConfig", "causal"),
    "LlamaForTokenClassification": ("LlamaConfig", "masked"),
    "BertForMaskedLM": ("BertConfig", "masked"),
    "BertLMHeadModel": ("BertConfig", "causal"),
    "T5ForConditionalGeneration": ("T5Config", "seq2seq"),
}
BARE = {"LlamaModel": "LlamaConfig", "BertModel": "BertConfig"}


def make(name: str, config: str) -> nn.Module:
    sizes = T5_SIZES if config == "T5Config" else SIZES
    return getattr(transformers, name)(getattr(transformers, config)(**sizes))


@pytest.mark.parametrize("head", HEADS)
def test_a_position_counts_if_it_predicts_a_label(head: str) -> None:
    drawn = random.Random(0)
    for length in (1, 2, 7):
        rows = [[drawn.choice([-100, 0, 5, 9]) for _ in range(length)] for _ in range(20)]
        predicted = [[-100] * length for _ in rows]
        for found, row in zip(predicted, rows, strict=True):
            for place, label in enumerate(row):
                at = place - 1 if head == "causal" else place
                if at >= 0:
                    found[at] = label
        assert shift_labels(torch.tensor(rows), head).tolist() == predicted
        counted = [[label != -100 for label in row] for row in predicted]
        assert answer_mask(torch.tensor(rows), head).tolist() == counted


@pytest.mark.parametrize("name", MODELS)
def test_heads_are_told_apart(name: str) -> None:
    config, head = MODELS[name]
    model = make(name, config)
    assert has_head(model) and head_of(model) == head
    assert head_of(nn.DataParallel(model), torch.zeros(2, 3, dtype=torch.long)) == head
    assert head_of(model, torch.zeros(2, dtype=torch.long)) == "classification"
    with pytest.raises(ObjectiveError, match="labels are real numbers"):
        head_of(model, torch.zeros(2, 3))


@pytest.mark.parametrize("name", BARE)
def test_layers_alone_have_no_head(name: str) -> None:
    assert not has_head(make(name, BARE[name]))
