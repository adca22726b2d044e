"""Criteria against their formulas, and localize from end to end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import clue_fast
from clue_fast.config import LocalizeConfig
from clue_fast.criteria import CRITERIA, measure, record_groups, score
from clue_fast.data import EncodedRecords, encode, load_records
from clue_fast.demo.people import make_people, records_of
from clue_fast.demo.pretraining import train_tokenizer
from clue_fast.errors import (
    BudgetError,
    DataError,
    PatchError,
    SelectionError,
    SettingError,
    SiteError,
    UnknownNameError,
)
from clue_fast.localization import localize_records
from clue_fast.selection import Selection

PEOPLE = make_people(6, seed=3)
FORGET, RETAIN = records_of(PEOPLE[:2]), records_of(PEOPLE[2:])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(FORGET + RETAIN, vocab_size=400)


@pytest.fixture
def model(make_llama: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return make_llama(tokenizer, width=48, units=120)


def answer_activations(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list, before: int | None = None
) -> dict:
    """Activations and their products with the gradient of the log-odds of the answers, [tokens, width].

    Where answers are predicted, or so many tokens before the first of them.
    """
    activations: dict[str, list[torch.Tensor]] = {}
    products: dict[str, list[torch.Tensor]] = {}
    for example in encode(records, tokenizer):
        inputs, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        seen: dict[str, torch.Tensor] = {}
        handles = [
            model.get_submodule(site.output).register_forward_pre_hook(
                lambda _, args, path=site.path, seen=seen: (args[0].retain_grad(), seen.__setitem__(path, args[0]))[1]
            )
            for site in clue_fast.find_sites(model)
        ]
        probability = model(inputs).logits[0, :-1].double().softmax(-1)
        answer = labels[1:] != -100
        chosen = probability[answer, labels[1:][answer]]
        (chosen.log() - (1 - chosen).log()).sum().backward()
        for handle in handles:
            handle.remove()
        first = int(answer.nonzero()[0])
        where = answer if before is None else torch.arange(len(answer)) == first - before
        for path, value in seen.items():
            activations.setdefault(path, []).append(value[0, :-1][where].detach().double())
            products.setdefault(path, []).append((value * value.grad)[0, :-1][where].detach().double())
    return {
        "activations": {path: torch.cat(parts) for path, parts in activations.items()},
        "products": {path: torch.cat(parts) for path, parts in products.items()},
    }


@pytest.mark.parametrize("criterion", ["difference", "ratio", "attribution"])
def test_scores_equal_the_formula_over_single_records(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, criterion: str
) -> None:
    forget, retain = (answer_activations(model, tokenizer, records) for records in (FORGET, RETAIN))
    model.zero_grad()
    scores = score(measure(model, FORGET, RETAIN, tokenizer=tokenizer, criterion=criterion, progress=False), criterion)
    for site, found in scores.items():
        f, r = forget["activations"][site.path], retain["activations"][site.path]
        if criterion == "difference":
            spread = ((f.var(0, correction=0) + r.var(0, correction=0)) / 2).sqrt()
            expected = (f.mean(0) - r.mean(0)).abs() / spread
        elif criterion == "ratio":
            expected = f.abs().mean(0) / (r.abs().mean(0) + 0.01)
        else:
            f, r = forget["products"][site.path], retain["products"][site.path]
            expected = f.abs().mean(0) - r.abs().mean(0)
        scale = expected.abs().amax()
        torch.testing.assert_close(found.double() / scale, expected / scale, rtol=1e-4, atol=1e-5)
    assert all(p.grad is None for p in model.parameters())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("criterion", ["difference", "attribution"])
def test_units_are_measured_where_the_records_say(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, criterion: str
) -> None:
    """What is differentiated stays the log-odds of the whole answer."""
    sets = {"forget": FORGET, "retain": RETAIN}
    encoded = {name: EncodedRecords(records, tokenizer) for name, records in sets.items()}
    for example in (example for records in encoded.values() for example in records.examples):
        place = example["labels"].count(-100) - 4  # three tokens before that which predicts the first of the answer
        example["counted"] = [int(position == place) for position in range(len(example["input_ids"]))]
    config = LocalizeConfig(criterion=criterion, fraction=0.1, permutations=0, progress=False)
    selection = localize_records(model, encoded, tokenizer, config)
    forget, retain = (answer_activations(model, tokenizer, records, 3) for records in (FORGET, RETAIN))
    for number, (site, found) in enumerate(selection.scores.items()):
        f, r = forget["activations"][site.path], retain["activations"][site.path]
        assert (len(f), len(r)) == (len(FORGET), len(RETAIN))
        expected = (f.mean(0) - r.mean(0)).abs() / ((f.var(0, correction=0) + r.var(0, correction=0)) / 2).sqrt()
        if criterion == "attribution":
            f, r = forget["products"][site.path], retain["products"][site.path]
            expected = f.abs().mean(0) - r.abs().mean(0)
            if number == 1:  # behind the last layer no token reads another
                assert not expected.any() and not found.any()
                continue
        scale = expected.abs().amax()
        torch.testing.assert_close(found.double() / scale, expected / scale, rtol=1e-4, atol=1e-5)
    del encoded["retain"].examples[1]["counted"]
    with pytest.raises(DataError, match="some records say with counted where units are measured"):
        localize_records(model, encoded, tokenizer, config)


def test_random_is_a_function_of_the_seed_and_needs_no_data(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    def found(seed: int) -> Selection:
        return clue_fast.localize(
            model, FORGET, RETAIN, tokenizer=tokenizer, criterion="random", fraction=0.1, seed=seed, progress=False
        )

    assert found(1).hash == found(1).hash != found(2).hash
    assert [len(found(1).units(site)) for site in found(1).sites] == [12, 12]


def test_the_batch_budget_does_not_change_the_selection(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = [
        clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, tokens_per_batch=budget, progress=False)
        for budget in (1, 200, 10_000)
    ]
    assert len({selection.hash for selection in found}) == 1


@pytest.mark.parametrize("criterion", ["difference", "attribution", "wanda", "random"])
def test_units_of_a_part_of_the_layers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, criterion: str
) -> None:
    """They have the scores that they have among all, and the budget is a share of them."""
    settings = {"tokenizer": tokenizer, "criterion": criterion, "fraction": 0.1, "progress": False}
    whole = clue_fast.localize(model, FORGET, RETAIN, **settings)
    upper = clue_fast.localize(model, FORGET, RETAIN, **settings, layers=(0.5, 1.0))
    (site,) = upper.sites
    assert site == whole.sites[1] and len(upper.units(site)) == 12
    assert upper.source["layers"] == [0.5, 1.0]
    if criterion != "random":
        torch.testing.assert_close(upper.scores[site], whole.scores[site])
    with pytest.raises(SiteError, match=r"2 layers with sites, and none of them lies between 0 and 0\.1 of the depth"):
        clue_fast.localize(model, FORGET, RETAIN, **settings, layers=(0.0, 0.1))


@pytest.mark.parametrize("criterion", ["attribution", "fisher", "salun"])
def test_nothing_is_kept_below_the_layers_that_are_asked_for(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, criterion: str
) -> None:
    """Of two equal layers about half of what the backward pass needs of both."""
    kept = {}
    for layers in (None, (0.5, 1.0)):
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            clue_fast.localize(
                model,
                FORGET,
                RETAIN,
                tokenizer=tokenizer,
                criterion=criterion,
                layers=layers,
                permutations=0,
                progress=False,
            )
        kept[layers] = sum(sizes)
    assert 0.3 * kept[None] < kept[0.5, 1.0] < 0.7 * kept[None]


def test_circuits_are_those_of_all_layers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SettingError, match="'circuit' follows circuits through all layers"):
        clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, criterion="circuit", layers=(0.5, 1.0))


def test_localize_leaves_the_model_as_it_was(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, criterion="attribution", progress=False)
    assert [module.training for module in model.modules()] == modes
    assert not model.lm_head.weight.requires_grad
    assert model.model.norm.weight.requires_grad
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


def test_a_selection_belongs_to_its_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    selection = clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, progress=False)
    selection.save(tmp_path / "s.safetensors")
    assert Selection.load(tmp_path / "s.safetensors", copy.deepcopy(model).bfloat16()).hash == selection.hash
    other = LlamaForCausalLM(model.config)
    with pytest.raises(SelectionError, match="belongs to the model"):
        Selection.load(tmp_path / "s.safetensors", other)


def test_categories_come_from_what_matters_to_each_set(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    selection = clue_fast.localize(
        model,
        FORGET,
        RETAIN,
        tokenizer=tokenizer,
        criterion="attribution",
        categories=True,
        fraction=0.3,
        progress=False,
    )
    forget, retain = (answer_activations(model, tokenizer, records)["products"] for records in (FORGET, RETAIN))
    for site in selection.sites:
        tops = [set(p[site.path].abs().mean(0).topk(36).indices.tolist()) for p in (forget, retain)]
        found = [
            set(torch.nonzero(selection.categories[site] == category).flatten().tolist()) for category in (1, 2, 3)
        ]
        assert found == [tops[0] - tops[1], tops[1] - tops[0], tops[0] & tops[1]]


class TestBadInput:
    def test_categories_of_a_comparison(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(SelectionError, match="has no categories"):
            clue_fast.localize(
                model, FORGET, RETAIN, tokenizer=tokenizer, criterion="difference", categories=True, progress=False
            )

    def test_unknown_criterion(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(UnknownNameError, match=r"'astrology'; choose one of: attribution"):
            clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, criterion="astrology")

    def test_forget_equal_to_retain(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match="equals"):
            clue_fast.localize(model, FORGET, FORGET, tokenizer=tokenizer)

    def test_fraction(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(BudgetError, match="outside"):
            clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, fraction=1.5)

    def test_score_without_recording(self, model: LlamaForCausalLM) -> None:
        with clue_fast.patch(model) as patched, pytest.raises(PatchError, match="no forget token"):
            clue_fast.score(patched.statistics)

    def test_attribution_without_gradients(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        with clue_fast.patch(model) as patched:
            data = [encode(load_records(records, "x"), tokenizer) for records in (FORGET, RETAIN)]
            record_groups(patched, data, pad_token_id=0, progress=False)
            with pytest.raises(PatchError, match="gradients=True"):
                clue_fast.score(patched.statistics, "attribution")


def test_every_criterion_names_its_source() -> None:
    for name, criterion in CRITERIA.items():
        assert criterion.name == name
        assert criterion.formula and criterion.source
