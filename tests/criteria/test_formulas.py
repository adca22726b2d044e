"""Every criterion against a slow loop written from its paper, on real weights, and what it costs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from clue_fast.criteria import CRITERIA, MEASUREMENTS, Measured, criterion, importances, score, weight_gradients
from clue_fast.criteria.integrated_gradients import STEPS
from clue_fast.criteria.measure import measure_batches
from clue_fast.criteria.passes import Batches
from clue_fast.errors import PatchError, SelectionError, UnknownNameError
from clue_fast.statistics import Statistics

from .conftest import counted_passes

Data = list[list[dict[str, list[int]]]]


class Answer(NamedTuple):
    """Of each answer token, [tokens]."""

    logit: Tensor
    log_probability: Tensor


class SlowLoop:
    """A model that runs one record at a time, with nothing but autograd and forward hooks."""

    def __init__(self, model: LlamaForCausalLM, data: Data) -> None:
        self.model = copy.deepcopy(model)
        self.layers = self.model.model.layers
        self.forget, self.retain = data

    def run(self, example: dict, scale: tuple[int, float] | None = None) -> tuple[dict, Answer, Tensor]:
        """Inputs of every linear module by layer and name; the answer; the positions that predict it."""
        inputs: dict[tuple[int, str], Tensor] = {}
        labels = torch.tensor(example["labels"])
        predicting = torch.nonzero(labels[1:] != -100).flatten()

        def hook(key: tuple[int, str]) -> Callable:
            def keep(module: torch.nn.Module, arguments: tuple) -> tuple:
                z = arguments[0]
                if scale is not None and key == (scale[0], "down_proj"):
                    z = z.detach().clone()
                    z[:, predicting] *= scale[1]
                    z.requires_grad_()
                z.retain_grad()
                inputs[key] = z
                return (z,)

            return keep

        handles = [
            getattr(layer.mlp, name).register_forward_pre_hook(hook((index, name)))
            for index, layer in enumerate(self.layers)
            for name in ("gate_proj", "up_proj", "down_proj")
        ]
        logits = self.model(torch.tensor([example["input_ids"]])).logits[0]
        for handle in handles:
            handle.remove()
        answers = labels[1:][predicting]
        rows = range(len(answers))
        answer = Answer(logits[predicting][rows, answers], logits[predicting].log_softmax(-1)[rows, answers])
        return inputs, answer, predicting

    def activations(self, data: list) -> list[Tensor]:
        """By layer, [predicting tokens, units]."""
        found: list[list[Tensor]] = [[] for _ in self.layers]
        for example in data:
            inputs, _, predicting = self.run(example)
            for index in range(len(self.layers)):
                found[index].append(inputs[index, "down_proj"][0, predicting].detach())
        return [torch.cat(parts) for parts in found]

    def products(self, data: list, target: Callable[[Answer], Tensor]) -> list[Tensor]:
        """a·∂f/∂a by layer, [predicting tokens, units]."""
        found: list[list[Tensor]] = [[] for _ in self.layers]
        for example in data:
            inputs, answer, predicting = self.run(example)
            target(answer).sum().backward()
            for index in range(len(self.layers)):
                z = inputs[index, "down_proj"]
                found[index].append((z * z.grad)[0, predicting].detach())
        return [torch.cat(parts) for parts in found]

    def weight_gradients(self, data: list) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
        """For each record and layer the gradients of gate, up and down, each as [units, width]."""
        found = []
        for example in data:
            self.model.zero_grad()
            _, answer, _ = self.run(example)
            (-answer.log_probability.mean()).backward()
            found.append(
                [
                    (
                        layer.mlp.gate_proj.weight.grad.clone(),
                        layer.mlp.up_proj.weight.grad.clone(),
                        layer.mlp.down_proj.weight.grad.T.clone(),
                    )
                    for layer in self.layers
                ]
            )
        return found

    def weights(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        mlp = self.layers[layer].mlp
        return mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach(), mlp.down_proj.weight.detach().T


def mean_over_sets(loop: SlowLoop, of: Callable[[list], list[Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(of(loop.forget), of(loop.retain), strict=True))


def slow_difference(loop: SlowLoop) -> list[Tensor]:
    pairs = mean_over_sets(loop, loop.activations)
    return [
        (f.mean(0) - r.mean(0)).abs() / ((f.var(0, correction=0) + r.var(0, correction=0)) / 2).sqrt() for f, r in pairs
    ]


def slow_signed_difference(loop: SlowLoop) -> list[Tensor]:
    pairs = mean_over_sets(loop, loop.activations)
    return [(f.mean(0) - r.mean(0)) / ((f.var(0, correction=0) + r.var(0, correction=0)) / 2).sqrt() for f, r in pairs]


def slow_welch(loop: SlowLoop) -> list[Tensor]:
    pairs = mean_over_sets(loop, loop.activations)
    return [(f.mean(0) - r.mean(0)).abs() / (f.var(0) / len(f) + r.var(0) / len(r)).sqrt() for f, r in pairs]


def slow_ratio(loop: SlowLoop) -> list[Tensor]:
    return [f.abs().mean(0) / (r.abs().mean(0) + 0.01) for f, r in mean_over_sets(loop, loop.activations)]


TARGETS = {
    "loss": lambda answer: -answer.log_probability,
    "logit": lambda answer: answer.logit,
    "log_odds": lambda answer: answer.log_probability - torch.log(-torch.expm1(answer.log_probability)),
}


def slow_attribution(loop: SlowLoop, target: str = "log_odds") -> list[Tensor]:
    pairs = mean_over_sets(loop, lambda data: loop.products(data, TARGETS[target]))
    return [f.abs().mean(0) - r.abs().mean(0) for f, r in pairs]


def slow_forget_attribution(loop: SlowLoop) -> list[Tensor]:
    return [p.abs().mean(0) for p in loop.products(loop.forget, TARGETS["log_odds"])]


def slow_fisher(loop: SlowLoop) -> list[Tensor]:
    def diagonal(data: list) -> list[Tensor]:
        gradients = loop.weight_gradients(data)
        return [
            sum(sum(g.square().sum(1) for g in record[layer]) for record in gradients) / len(data)
            for layer in range(len(loop.layers))
        ]

    return [f / r for f, r in mean_over_sets(loop, diagonal)]


def mean_weight_gradients(loop: SlowLoop) -> list[tuple[list[Tensor], list[Tensor]]]:
    """For each layer the mean gradients of gate, up and down over the records of both sets."""

    def mean(data: list) -> list[list[Tensor]]:
        gradients = loop.weight_gradients(data)
        return [
            [torch.stack([record[layer][part] for record in gradients]).mean(0) for part in range(3)]
            for layer in range(len(loop.layers))
        ]

    return mean_over_sets(loop, mean)


def slow_salun(loop: SlowLoop) -> list[Tensor]:
    return [sum(g.abs().sum(1) for g in forget) for forget, _ in mean_weight_gradients(loop)]


def slow_wagle(loop: SlowLoop) -> list[Tensor]:
    gamma = 1e-6
    scores = []
    for layer, (forget, retain) in enumerate(mean_weight_gradients(loop)):
        of_weights = [w * f - r * f / gamma for w, f, r in zip(loop.weights(layer), forget, retain, strict=True)]
        scores.append(sum(s.sum(1) for s in of_weights).abs())
    return scores


def slow_wanda(loop: SlowLoop) -> list[Tensor]:
    def score_of(data: list) -> list[Tensor]:
        inputs: dict[tuple[int, str], list[Tensor]] = {}
        for example in data:
            seen, _, predicting = loop.run(example)
            for key, z in seen.items():
                inputs.setdefault(key, []).append(z[0, predicting].detach())
        norms = {key: torch.cat(z).square().mean(0).sqrt() for key, z in inputs.items()}
        scores = []
        for layer in range(len(loop.layers)):
            gate, up, down = loop.weights(layer)
            rows = (gate.abs() * norms[layer, "gate_proj"]).sum(1) + (up.abs() * norms[layer, "up_proj"]).sum(1)
            scores.append(rows + (down.abs() * norms[layer, "down_proj"][:, None]).sum(1))
        return scores

    return [f - r for f, r in mean_over_sets(loop, score_of)]


def slow_integrated_gradients(loop: SlowLoop) -> list[Tensor]:
    def attributed(data: list) -> list[Tensor]:
        scores = []
        for layer in range(len(loop.layers)):
            total = torch.zeros(352, dtype=loop.model.dtype)
            for example in data:
                inputs, _, predicting = loop.run(example)
                a = inputs[layer, "down_proj"][0, predicting].detach()
                for step in range(1, STEPS + 1):
                    inputs, answer, _ = loop.run(example, (layer, step / STEPS))
                    answer.log_probability.exp().sum().backward()
                    total += (a * inputs[layer, "down_proj"].grad[0, predicting]).sum(0) / STEPS
            scores.append(total / len(data))
        return scores

    return [f - r for f, r in mean_over_sets(loop, attributed)]


SLOW = {name.removeprefix("slow_"): function for name, function in list(globals().items()) if name.startswith("slow_")}


def measured(model: LlamaForCausalLM, data: Data, name: str, **options: object) -> Statistics:
    return measure_batches(model, Batches(data, 0, 130, progress=False), name, **options)


def short(stories: Data, name: str) -> Data:
    """Less data for the criterion that runs the model a hundred times."""
    if name != "integrated_gradients":
        return stories
    first = [[{key: values[:9] for key, values in example.items()} for example in examples] for examples in stories]
    return [first[0][:1], first[1][:2]]


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    found, expected = torch.cat(found).double(), torch.cat(expected).double()
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", SLOW)
def test_scores_equal_a_slow_loop_from_the_paper(baby_llama: LlamaForCausalLM, stories: Data, name: str) -> None:
    data = short(stories, name)
    expected = SLOW[name](SlowLoop(baby_llama.double(), data))
    assert relative_error(list(score(measured(baby_llama, data, name), name).values()), expected) <= 1e-5
    if name in ("wanda", "welch", "fisher", "salun", "wagle", "attribution"):
        # In float32 the forward pass itself errs; the loop in float32 errs as much.
        own = relative_error(SLOW[name](SlowLoop(baby_llama.float(), data)), expected)
        assert relative_error(list(score(measured(baby_llama, data, name), name).values()), expected) <= 2 * own


FORMULAS = [name for name, each in CRITERIA.items() if not each.many_retain_sets]
"""All but circuits, which are of prompts and not of statistics; see ``circuit``."""


@pytest.mark.parametrize("name", [name for name in FORMULAS if "gradients" in CRITERIA[name].needs])
def test_answers_of_one_token_matter(baby_llama: LlamaForCausalLM, stories: Data, name: str) -> None:
    """The last token of the prompt predicts all there is: what units do there is seen, and is not nothing."""
    data = [
        [{"input_ids": each["input_ids"][:7], "labels": each["labels"][:7]} for each in examples]
        for examples in short(stories, name)
    ]
    assert all(sum(label != -100 for label in each["labels"]) == 1 for examples in data for each in examples)
    expected = SLOW[name](SlowLoop(baby_llama.double(), data))
    found = list(score(measured(baby_llama, data, name), name).values())
    assert min(float(values.abs().max()) for values in found) > 0
    assert relative_error(found, expected) <= 1e-5


def test_no_criterion_is_without_a_slow_loop() -> None:
    assert set(SLOW) | {"random"} == set(FORMULAS) == set(CRITERIA) - {"circuit"}


@pytest.mark.parametrize("name", FORMULAS)
def test_cost_in_passes_over_the_data(baby_llama: LlamaForCausalLM, stories: Data, name: str) -> None:
    data = short(stories, name)
    records = sum(map(len, data))
    with counted_passes(baby_llama) as passes:
        measured(baby_llama, data, name)
    factor = STEPS * len(baby_llama.model.layers) if name == "integrated_gradients" else 1
    expected = MEASUREMENTS[CRITERIA[name].needs].passes
    assert (passes.forward, passes.backward) == tuple(records * factor * n for n in expected)


@pytest.mark.parametrize("target", TARGETS)
def test_attribution_of_each_target(baby_llama: LlamaForCausalLM, stories: Data, target: str) -> None:
    expected = slow_attribution(SlowLoop(baby_llama.double(), stories), target)
    found = score(measured(baby_llama, stories, "attribution", target=target), "attribution")
    assert relative_error(list(found.values()), expected) <= 1e-5


@pytest.mark.parametrize("name", ["fisher", "salun", "wagle", "wanda", "integrated_gradients"])
def test_batches_do_not_matter(baby_llama: LlamaForCausalLM, stories: Data, name: str) -> None:
    forget, retain = short(stories, name)
    found = [
        list(score(measure_batches(baby_llama.double(), Batches(data, 0, budget, progress=False), name), name).values())
        for data, budget in (([forget, retain], 1), ([forget, retain], 10_000), ([forget, retain[::-1]], 60))
    ]
    for other in found[1:]:
        assert relative_error(other, found[0]) <= 1e-6


@pytest.mark.parametrize("name", [name for name, each in CRITERIA.items() if each.importance is not None])
def test_importances_are_of_one_set_alone(baby_llama: LlamaForCausalLM, stories: Data, name: str) -> None:
    forget, retain = short(stories, name)
    there = importances(measured(baby_llama, [forget, retain], name), name)
    swapped = importances(measured(baby_llama, [retain, forget], name), name)
    for site in there[0]:
        torch.testing.assert_close(there[0][site], swapped[1][site], rtol=1e-4, atol=1e-7)
        assert not torch.equal(there[0][site], there[1][site])


def test_gradients_of_the_weights_of_heads(baby_llama: LlamaForCausalLM, stories: Data) -> None:
    """Query heads own rows of q and columns of o, key/value heads rows of k and v."""
    model = baby_llama.double()
    statistics = measured(model, stories, "fisher", kinds=("attention",))
    found = importances(statistics, "fisher")[0]
    expected: dict[str, Tensor] = {"attention_query": torch.zeros(8), "attention_key_value": torch.zeros(4)}
    loop = SlowLoop(model, stories)
    for example in loop.forget:
        loop.model.zero_grad()
        (-loop.run(example)[1].log_probability.mean()).backward()
        attention = loop.layers[2].self_attn
        q, k, v = (getattr(attention, f"{name}_proj").weight.grad.view(-1, 16 * 128) for name in "qkv")
        o = attention.o_proj.weight.grad.T.reshape(8, 16 * 128)
        expected["attention_query"] = expected["attention_query"] + (q.square() + o.square()).sum(1) / len(loop.forget)
        expected["attention_key_value"] = expected["attention_key_value"] + (k.square() + v.square()).sum(1) / len(
            loop.forget
        )
    layer = {site.kind: values for site, values in found.items() if site.layer == 2}
    for kind, values in layer.items():
        assert relative_error([values], [expected[kind]]) <= 1e-5


def ranks(scores: Tensor) -> Tensor:
    return scores.argsort().argsort().double()


def spearman(one: list[Tensor], other: list[Tensor]) -> float:
    return float(torch.corrcoef(torch.stack([ranks(torch.cat(one)), ranks(torch.cat(other))]))[0, 1])


def test_wagle_ranks_as_the_exact_unit_score_in_any_dtype(baby_llama: LlamaForCausalLM, stories: Data) -> None:
    exact = slow_wagle(SlowLoop(copy.deepcopy(baby_llama).double(), stories))
    for dtype, least in ((torch.float64, 0.9999), (torch.float32, 0.9999), (torch.bfloat16, 0.98)):
        model = copy.deepcopy(baby_llama).to(dtype)
        own = spearman(slow_wagle(SlowLoop(model, stories)), exact)
        assert spearman(list(score(measured(model, stories, "wagle"), "wagle").values()), exact) >= min(least, own)


def test_another_retain_set_makes_another_ranking_of_wagle(baby_llama: LlamaForCausalLM, stories: Data) -> None:
    forget, retain = stories

    def found(kept: list) -> list[Tensor]:
        return list(score(measured(baby_llama, [forget, kept], "wagle"), "wagle").values())

    def tops(scores: list[Tensor]) -> set[int]:
        return set(torch.cat(scores).topk(176).indices.tolist())

    one, other = found(retain[:2]), found(retain[2:])
    assert spearman(one, found(retain[:2])) == pytest.approx(1)
    assert spearman(one, other) < 0.9
    assert len(tops(one) & tops(other)) < 0.9 * 176


def test_gradients_of_weights_and_biases_of_another_family(stories: Data) -> None:
    """GPT-2 has its weights as [inputs, outputs], and biases that belong to units."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=105, n_embd=24, n_layer=2, n_head=2, n_positions=64, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2
    )
    model = GPT2LMHeadModel(config).double().eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)

    def owned(layer: int, of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        mlp = model.transformer.h[layer].mlp
        return [of(mlp.c_fc.weight).T, of(mlp.c_fc.bias)[:, None], of(mlp.c_proj.weight)]

    means, squares = [], []
    for data in stories:
        records = []
        for example in data:
            model.zero_grad()
            labels = torch.tensor([example["labels"]])
            model(torch.tensor([example["input_ids"]]), labels=labels).loss.backward()
            records.append([owned(layer, lambda p: p.grad.clone()) for layer in range(2)])
        means.append(
            [[torch.stack(each).mean(0) for each in zip(*layers, strict=True)] for layers in zip(*records, strict=True)]
        )
        squares.append([sum(sum(g.square().sum(1) for g in r[n]) for r in records) / len(data) for n in range(2)])
    expected: dict[str, list[Tensor]] = {"salun": [], "wagle": [], "fisher": []}
    for layer in range(2):
        parts = list(zip(owned(layer, torch.detach), means[0][layer], means[1][layer], strict=True))
        expected["salun"].append(sum(f.abs().sum(1) for _, f, _ in parts))
        expected["wagle"].append(sum(((w - r / 1e-6) * f).sum(1) for w, f, r in parts).abs())
        expected["fisher"].append(squares[0][layer] / squares[1][layer])
    for name, scores in expected.items():
        assert relative_error(list(score(measured(model, stories, name), name).values()), scores) <= 1e-6


def test_mean_gradients_in_little_memory_are_the_same(
    baby_llama: LlamaForCausalLM, stories: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more pass for every chunk of modules whose gradients fit."""
    model = baby_llama.double()
    at_once = measured(model, stories, "wagle")
    gate = 2 * 8 * 352 * 128
    monkeypatch.setattr(weight_gradients.mean_gradient_recorders, "__defaults__", (4 * gate,))
    with counted_passes(model) as passes:
        in_chunks = measured(model, stories, "wagle")
    assert passes.forward == passes.backward == 4 * 9  # 15 modules, 4 at a time
    for name, sums in at_once.record_sums.items():
        torch.testing.assert_close(in_chunks.record_sums[name], sums)
    assert in_chunks.records.tolist() == at_once.records.tolist() == [4, 5]


def test_gradients_of_weights_leave_nothing_behind(baby_llama: LlamaForCausalLM, stories: Data) -> None:
    for name in ("fisher", "salun", "wagle", "wanda", "integrated_gradients"):
        measured(baby_llama, short(stories, name), name)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in baby_llama.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in baby_llama.modules())


def test_a_criterion_of_ones_own(baby_llama: LlamaForCausalLM, stories: Data) -> None:
    @criterion(needs="activations", importance=lambda units: units.max_abs)
    def peak(measured: Measured) -> Tensor:
        """max_forget|a| - max_retain|a|

        Source: this test.
        """
        return measured.forget.max_abs - measured.retain.max_abs

    try:
        statistics = measured(baby_llama, stories, "peak")
        site = statistics.sites[0]
        forget, retain = (statistics.of(site, group).max_abs for group in ("forget", "retain"))
        torch.testing.assert_close(score(statistics, "peak")[site].double(), forget - retain, rtol=1e-6, atol=1e-7)
        assert CRITERIA["peak"].source == "this test."
        assert CRITERIA["peak"].formula == "max_forget|a| - max_retain|a|"
    finally:
        del CRITERIA["peak"]


def test_a_criterion_without_a_source_is_refused() -> None:
    with pytest.raises(ValueError, match="Source"):
        criterion(needs="activations")(lambda measured: measured.forget.mean)
    with pytest.raises(UnknownNameError, match="luck"):
        criterion(needs="luck")


def test_importances_of_a_comparison(baby_llama: LlamaForCausalLM, stories: Data) -> None:
    with pytest.raises(SelectionError, match="choose one of: attribution, circuit, fisher"):
        importances(measured(baby_llama, stories, "difference"), "difference")


def test_scoring_with_what_was_not_recorded(baby_llama: LlamaForCausalLM, stories: Data) -> None:
    statistics = measured(baby_llama, stories, "wanda")
    with pytest.raises(PatchError, match="gradient_square"):
        score(statistics, "fisher")
    with pytest.raises(PatchError, match="no forget record"):
        score(measured(baby_llama, stories, "difference"), "fisher")


def test_sums_over_records_are_saved_and_merged(baby_llama: LlamaForCausalLM, stories: Data, tmp_path: Path) -> None:
    whole = measured(baby_llama, stories, "fisher")
    halves = [
        measured(baby_llama, [examples[part] for examples in stories], "fisher") for part in (slice(2), slice(2, 9))
    ]
    halves[0].save(tmp_path / "half.safetensors")
    merged = Statistics.load(tmp_path / "half.safetensors").merge(halves[1])
    assert merged.records.tolist() == whole.records.tolist() == [4, 5]
    assert relative_error(list(score(merged, "fisher").values()), list(score(whole, "fisher").values())) <= 1e-4
