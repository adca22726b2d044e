"""Objectives on heads other than a causal language model's: what they predict, train, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import clue_fast
from clue_fast.data.collator import head_of
from clue_fast.errors import DataError, ObjectiveError
from clue_fast.objectives import OBJECTIVES, RMU, get_objective, predict
from clue_fast.trainer.pairing import grouped

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}


def make_t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, dropout_rate=0.0))


def make_bert(kind: str, **config: Any) -> Any:
    import transformers

    settings = {"vocab_size": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "num_labels": 4}
    return getattr(transformers, kind)(transformers.BertConfig(**SMALL | settings | config))


def make_llava() -> Any:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(**SMALL, image_size=8, patch_size=4, projection_dim=16)
    text = LlamaConfig(**SMALL, vocab_size=40, num_key_value_heads=2)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, image_seq_length=4)
    return LlavaForConditionalGeneration(config)


def text(seed: int, records: int, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, length + 1, (records, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {
        "input_ids": torch.randint(3, 38, (records, length), generator=generator) * mask,
        "attention_mask": mask,
    }


def labels(batch: dict[str, Tensor], seed: int, length: int) -> Tensor:
    """A random token at each of a random part of the positions, at least one a record."""
    generator = torch.Generator().manual_seed(seed)
    records = len(batch["input_ids"])
    chosen = torch.rand(records, length, generator=generator) < 0.5
    chosen[:, 1] = True
    return torch.randint(3, 38, (records, length), generator=generator).masked_fill(~chosen, -100)


def make_batch(head: str, seed: int, records: int = 3, length: int = 7) -> dict[str, Tensor]:
    batch = text(seed, records, length)
    if head == "vision":
        batch["input_ids"][:, :4] = 39
        batch["attention_mask"][:, :4] = 1
        batch["pixel_values"] = torch.randn(records, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        return {**batch, "labels": labels(batch, seed, length).masked_fill(batch["attention_mask"] == 0, -100)}
    if head == "classification":
        return {**batch, "labels": torch.arange(records) % 4}
    return {**batch, "labels": labels(batch, seed, length if head == "masked" else length - 2)}


MODELS = {
    "seq2seq": make_t5,
    "masked": lambda: make_bert("BertForMaskedLM"),
    "classification": lambda: make_bert("BertForSequenceClassification"),
    "vision": make_llava,
}


@pytest.fixture(params=MODELS)
def case(request: pytest.FixtureRequest) -> tuple[str, Any]:
    torch.manual_seed(0)
    return request.param, MODELS[request.param]().eval()


class Untrained:
    """The original is the model itself."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def set_batch_layout(self, forget: int, records: int, tokens: int) -> None:
        assert 0 < forget <= records and tokens > 0

    def original(self) -> Any:
        return torch.no_grad()


def test_a_record_has_the_loss_of_the_stock_model(case):
    """Two batches of different length in one pass: every record as the model itself scores it, alone and unpadded."""
    head, model = case
    both = {"forget": make_batch(head, 0), "retain": make_batch(head, 1, records=2, length=9)}
    assert head_of(model, both["forget"]["labels"]) == ("causal" if head == "vision" else head)
    found = predict(model, both)
    for side, batch in both.items():
        for record in range(len(batch["labels"])):
            alone = {name: tensor[record : record + 1] for name, tensor in batch.items()}
            if head in ("seq2seq", "classification"):
                kept = int(alone["attention_mask"].sum())
                alone |= {name: alone[name][:, :kept] for name in ("input_ids", "attention_mask")}
            expected = model(**alone).loss
            mean = found[side].mean(found[side].losses)[record]
            torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)


def test_a_training_is_recorded_where_labels_are_predicted(case):
    """Forget and retain in one pass, as a trainer runs them, against hooks on every record alone."""
    head, model = case
    both = {"forget": make_batch(head, 0), "retain": make_batch(head, 1, records=2, length=9)}
    if head == "seq2seq":  # as many labels as the encoder has tokens
        both["forget"]["labels"] = labels(both["forget"], 0, 7)
    with clue_fast.patch(model) as patched, patched.record("other"):
        batches = grouped(both, head_of(model, both["forget"]["labels"]))
        predict(model, batches)
    for site in [site for site in patched.sites if head != "vision" or "language_model" in site.path]:
        for side, batch in both.items():
            kept: list[Tensor] = []
            for record in range(len(batch["labels"])):
                alone = {name: tensor[record : record + 1] for name, tensor in batch.items()}
                attended = torch.nonzero(alone["attention_mask"][0]).flatten()
                places = torch.nonzero(batch["labels"][record] != -100).flatten()
                if head == "classification" or "encoder.block" in site.path:
                    places = attended
                elif head == "vision":
                    places = torch.tensor([place - 1 for place in places.tolist() if place > 0])
                if head == "masked":  # its mask may hide what has a label
                    places = torch.tensor([place for place in places.tolist() if place in attended.tolist()])

                def keep(_: Any, inputs: tuple[Tensor, ...], places: Tensor = places, kept: list = kept) -> None:
                    kept.append(inputs[0][0, places].double())

                handle = model.get_submodule(site.output).register_forward_pre_hook(keep)
                with torch.no_grad():
                    model(**alone)
                handle.remove()
            found, expected = patched.statistics.of(site, side), torch.cat(kept)
            assert found.count == len(expected) > 0
            torch.testing.assert_close(found.mean, expected.mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_trains_or_is_refused_by_name(name, case):
    head, model = case
    objective = RMU(layer=1, retain_weight=1.0) if name == "rmu" else get_objective(name, retain_weight=1.0)
    batches = {
        "forget": make_batch(head, 0),
        "alternate": make_batch(head, 2),
        "retain": make_batch(head, 1, records=2, length=9),
    }
    head = "causal" if head == "vision" else head
    nonsense = {"seq2seq": ["rmu"], "masked": ["dpo", "refusal"], "classification": ["dpo", "refusal"], "causal": []}
    if name in nonsense[head]:
        with pytest.raises(ObjectiveError, match=rf"{name} makes no sense for {type(model).__name__}.* {head} head"):
            objective.loss(model, batches, Untrained(model))
        return
    loss, logs = objective.loss(model, batches, Untrained(model))
    loss.backward()
    assert torch.isfinite(loss) and set(logs) >= {"forget_loss", "retain_loss"}
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients and all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_refuses_labels_without_a_likelihood(problem):
    model = make_bert("BertForSequenceClassification", problem_type=problem)
    batch = {**text(0, 3, 7), "labels": torch.rand(3, 1 if problem == "regression" else 4)}
    with pytest.raises(ObjectiveError, match="labels are real numbers"):
        get_objective("simnpo").loss(model, {"forget": batch, "retain": batch}, Untrained(model))


def test_refuses_a_head_without_logits():
    model = make_bert("BertForQuestionAnswering", num_labels=2)
    batch = {**text(0, 3, 7), "labels": torch.arange(3)}
    with pytest.raises(ObjectiveError, match="BertForQuestionAnswering returns no logits"):
        get_objective("simnpo").loss(model, {"forget": batch, "retain": batch}, Untrained(model))


def test_refuses_images_of_different_sizes():
    model = make_llava()
    forget, retain = make_batch("vision", 0), make_batch("vision", 1)
    retain["pixel_values"] = torch.randn(3, 3, 4, 4)
    with pytest.raises(DataError, match="pixel_values has the shapes"):
        get_objective("simnpo").loss(model, {"forget": forget, "retain": retain}, Untrained(model))
