"""Circuits of data sets, and localize through circuits from end to end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.llama import LlamaConfig

import clue_fast
from clue_fast.config import CircuitConfig
from clue_fast.criteria.circuit import Discovery, discover, select_units
from clue_fast.criteria.circuit.architecture import find_architecture
from clue_fast.criteria.circuit.discovery import check_units, score_within
from clue_fast.criteria.circuit.graph import Graph
from clue_fast.demo.people import make_people, records_of
from clue_fast.demo.pretraining import Shape, TrainConfig, train_model, train_tokenizer
from clue_fast.errors import BudgetError, CircuitError, DataError, SelectionError, SiteError, UnknownNameError
from clue_fast.objectives import get_objective
from clue_fast.selection import CATEGORIES, CONFLICT, FORGET, RETAIN, Scores, Selection
from clue_fast.trainer.stages import get_stages

PEOPLE = make_people(6, seed=3)
FORGET_RECORDS, RETAIN_RECORDS, MORE_RECORDS = (
    records_of(PEOPLE[part]) for part in (slice(2), slice(2, 4), slice(4, 6))
)
EVERYTHING = FORGET_RECORDS + RETAIN_RECORDS + MORE_RECORDS
SETTINGS = CircuitConfig(edges=40)
PROJECTIONS = {f"projection_{role}" for role in ("query", "key", "value", "output")}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(EVERYTHING, vocab_size=500)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A model that has begun to know six people."""
    shape, config = Shape(layers=2, width=48, units=96), TrainConfig(epochs=25, batch_size=12, lr=5e-3)
    return train_model(EVERYTHING, tokenizer, shape=shape, config=config, progress=False).eval()


@pytest.fixture(scope="module")
def discovery(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Discovery:
    retain = {"some": RETAIN_RECORDS, "more": MORE_RECORDS}
    return discover(model, FORGET_RECORDS, retain, tokenizer=tokenizer, settings=SETTINGS, progress=False)


class TestDiscovery:
    def test_circuits_have_equal_numbers_of_edges(self, discovery: Discovery) -> None:
        assert list(discovery.circuits) == ["forget", "some", "more"]
        assert {own.found for own in discovery.circuits.values()} == {40}
        for own in discovery.circuits.values():
            assert {gate for gate in own.edges.values()} <= {"AND", "OR", "ADDER"}

    def test_categories_follow_from_the_circuits(self, discovery: Discovery) -> None:
        forget = set(discovery.circuits["forget"].nodes)
        retain = set(discovery.circuits["some"].nodes) | set(discovery.circuits["more"].nodes)
        assert set(discovery.categories) == (forget | retain) - {"logits", "embed"}
        assert set(discovery.common) == (forget & retain) - {"logits", "embed"}
        for node, category in discovery.categories.items():
            if category == "forget":
                assert node in forget
            elif category == "retain":
                assert node in retain
            elif category == "conflict":
                assert node in forget & retain
        assert sum(category == "conflict" for category in discovery.categories.values()) == discovery.solution.conflicts

    def test_the_table_names_every_node(self, discovery: Discovery) -> None:
        table = discovery.table()
        assert (
            "proven fewest" in table
            and f"nodes in conflict: {discovery.solution.conflicts} of {len(discovery.common)} common" in table
        )
        assert "the subject differs in 100.0%" in table
        assert all(f" {node}" in table for node in discovery.categories)

    def test_the_model_comes_back_as_it_was(self, model: LlamaForCausalLM, discovery: Discovery) -> None:
        assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())

    def test_the_same_run_finds_the_same(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, discovery: Discovery
    ) -> None:
        retain = {"some": RETAIN_RECORDS, "more": MORE_RECORDS}
        again = discover(model, FORGET_RECORDS, retain, tokenizer=tokenizer, settings=SETTINGS, progress=False)
        assert again.categories == discovery.categories


class TestUnits:
    def importances(self, model: LlamaForCausalLM, kinds: tuple[str, ...] = ("mlp",)) -> tuple[Scores, Scores]:
        sites = clue_fast.find_sites(model, kinds)
        generator = torch.Generator().manual_seed(0)
        first, second = ({site: torch.rand(site.width, generator=generator) for site in sites} for _ in range(2))
        return Scores(first, "attribution", "f" * 16), Scores(second, "attribution", "f" * 16)

    def test_the_top_of_an_mlp_has_its_category(self, model: LlamaForCausalLM, discovery: Discovery) -> None:
        selection = select_units(discovery, *self.importances(model), 0.25)
        for site in selection.sites:
            if site.kind != "mlp":
                continue
            category = CATEGORIES.index(discovery.categories.get(f"m{site.layer}", "irrelevant"))
            found = selection.categories[site]
            assert set(found.tolist()) == ({0, category} if category else {0})
            assert int((found != 0).sum()) == (24 if category else 0)

    def test_the_granularity_of_nodes_takes_all_units(self, model: LlamaForCausalLM, discovery: Discovery) -> None:
        selection = select_units(discovery, *self.importances(model), 0.25, granularity="node")
        for site in selection.sites:
            if site.kind == "mlp":
                category = CATEGORIES.index(discovery.categories.get(f"m{site.layer}", "irrelevant"))
                assert set(selection.categories[site].tolist()) == {category}

    def test_heads_have_the_category_of_what_they_write_and_read(
        self, model: LlamaForCausalLM, discovery: Discovery
    ) -> None:
        selection = select_units(discovery, *self.importances(model, ("attention",)), 0.25)
        bits = {"irrelevant": 0, "forget": 1, "retain": 2, "conflict": 3}
        assert {site.kind for site in selection.sites} == {"attention_head"}
        for site in selection.sites:
            for head, category in enumerate(selection.categories[site].tolist()):
                nodes = [f"a{site.layer}.{name}" for name in (f"h{head}", f"h{head}.q", f"g{head}.k", f"g{head}.v")]
                expected = 0
                for node in nodes:
                    expected |= bits[discovery.categories.get(node, "irrelevant")]
                assert category == expected

    @pytest.mark.parametrize("name", ["llama", "grouped", "phi3", "gpt2", "gpt_neox", "falcon_grouped"])
    def test_a_projection_of_a_head_has_the_category_of_its_node_alone(
        self, family: Callable[[str], PreTrainedModel], discovery: Discovery, name: str
    ) -> None:
        """Also of key/value heads that several heads share, and where q, k and v are packed."""
        model = family(name)
        graph = Graph(find_architecture(model))
        nodes = dict.fromkeys(node.name for node in (*graph.writers, *graph.readers))
        bits = {name: index % 4 for index, name in enumerate(nodes)}
        categories = {name: CATEGORIES[own] for name, own in bits.items()}
        made = dataclasses.replace(discovery, graph=graph, categories=categories)
        selection = select_units(made, *self.importances(model, ("projection",)), 0.25)
        assert {site.kind for site in selection.sites} == PROJECTIONS
        pattern = {"query": "a{}.h{}.q", "key": "a{}.g{}.k", "value": "a{}.g{}.v", "output": "a{}.h{}"}
        for site in selection.sites:
            names = pattern[site.kind.removeprefix("projection_")]
            expected = [bits[names.format(site.layer, head)] for head in range(site.width)]
            assert selection.categories[site].tolist() == expected, site.name

    def test_heads_that_the_circuit_has_not_and_budgets_beyond_an_mlp_are_refused_before_any_pass(
        self, family: Callable[[str], PreTrainedModel]
    ) -> None:
        model, other = family("llama"), family("qwen3")
        graph = Graph(find_architecture(model))
        with pytest.raises(CircuitError, match="projection_key has 2 units, the circuit has 4 heads"):
            check_units(graph, clue_fast.find_sites(other, ("projection",)))
        sites = clue_fast.find_sites(model, ("mlp", "projection"))
        check_units(graph, sites, {"mlp": 0.5})
        with pytest.raises(BudgetError, match="count 49 is more than the 48 units"):
            check_units(graph, sites, count=49)
        with pytest.raises(BudgetError, match="no unit is of the kind 'projection_key'"):
            check_units(graph, sites, {"projection_key": 0.5})

    def test_units_are_ranked_by_what_their_category_asks_for(self) -> None:
        forget, retain = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
        every = torch.ones(4, dtype=torch.int8)
        assert score_within(FORGET * every, forget, retain).argmax() == 0
        assert score_within(RETAIN * every, forget, retain).argmax() == 3
        assert score_within(CONFLICT * every, forget, torch.tensor([1.0, 4.0, 3.0, 2.0])).argmax() == 1
        assert score_within(0 * every, forget, retain).tolist() == [0.0] * 4

    def test_forget_and_conflict_nodes_train_in_the_stages_of_the_paper(
        self, model: LlamaForCausalLM, discovery: Discovery
    ) -> None:
        made = dataclasses.replace(discovery, categories={"m0": "forget", "m1": "conflict"})
        selection = select_units(made, *self.importances(model), 0.25)
        assert [stage.units for stage in get_stages("clue", get_objective("simnpo"), selection)] == [
            ("forget",),
            ("conflict",),
        ]
        assert [len(selection.restrict(name)) for name in ("forget", "conflict")] == [24, 24]


class TestLocalize:
    def test_from_end_to_end(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        selection = clue_fast.localize(
            model,
            FORGET_RECORDS,
            {"some": RETAIN_RECORDS, "more": MORE_RECORDS},
            tokenizer=tokenizer,
            criterion="circuit",
            circuit=CircuitConfig(edges=40, steps=1),
            fraction=0.1,
            progress=False,
        )
        source = selection.source
        assert source["criterion"] == "circuit" and source["retain_sets"] == ["some", "more"]
        assert "not measured: circuits do not come from sums over records" in selection.summary()
        assert source["conflicts"] == source["conflicts_at_least"] <= source["common"]
        assert set(source["gates"]) == set(source["corrupted"]) == {"forget", "some", "more"}
        assert {sum(source["gates"][name].values()) - count for name, count in source["edges"].items()} == {0}
        assert source["corrupted"]["forget"]["subject_differs"] == 1.0
        assert selection.statistics is not None
        assert {site.kind for site in selection.sites} == {"mlp", *PROJECTIONS}
        selection.save(tmp_path / "s.safetensors")
        assert Selection.load(tmp_path / "s.safetensors", model).hash == selection.hash

    @pytest.mark.parametrize("name", ["grouped", "gpt2", "gpt_neox", "falcon_grouped", "gemma2", "olmo2"])
    def test_every_family(
        self, family: Callable[[str], PreTrainedModel], name: str, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        model = family(name)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        torch.nn.init.normal_(model.get_input_embeddings().weight)
        options = {"tokenizer": tokenizer, "progress": False}
        circuit = clue_fast.localize(
            model, FORGET_RECORDS, RETAIN_RECORDS, criterion="circuit", circuit=CircuitConfig(edges=0.3), **options
        )
        assert len(circuit) > 0
        for criterion in ("fisher", "wanda"):
            selection = clue_fast.localize(
                model, FORGET_RECORDS, RETAIN_RECORDS, criterion=criterion, kinds=("mlp", "attention"), **options
            )
            assert {site.layer for site in selection.sites if len(selection.units(site))} == {0, 1}

    def test_experts(self, family: Callable[[str], PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> None:
        model = family("mixtral")
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        torch.nn.init.normal_(model.get_input_embeddings().weight)
        options = {"tokenizer": tokenizer, "progress": False}
        settings = {"criterion": "circuit", "circuit": CircuitConfig(edges=0.5), "fraction": 0.1}
        selection = clue_fast.localize(model, FORGET_RECORDS, RETAIN_RECORDS, **settings, **options)
        experts = [site for site in selection.sites if site.kind == "expert"]
        assert len(experts) == 8 and all(len(selection.units(site)) == 5 for site in experts)
        with pytest.raises(SiteError, match=r"experts.*belongs to no linear module"):
            clue_fast.localize(model, FORGET_RECORDS, RETAIN_RECORDS, criterion="fisher", **options)
        with pytest.raises(SiteError, match="attention_key_value"):
            clue_fast.localize(
                model,
                FORGET_RECORDS,
                RETAIN_RECORDS,
                criterion="integrated_gradients",
                kinds=("attention",),
                **options,
            )

    def test_bad_input(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
        def run(retain: object = RETAIN_RECORDS, **options: object) -> Selection:
            return clue_fast.localize(
                model,
                FORGET_RECORDS,
                retain,
                tokenizer=tokenizer,
                **{"criterion": "circuit", "progress": False, **options},
            )

        with pytest.raises(DataError, match="in the retain set too"):
            run(RETAIN_RECORDS + FORGET_RECORDS[:1])
        with pytest.raises(BudgetError, match="more than the"):
            run(circuit=CircuitConfig(edges=10_000))
        with pytest.raises(BudgetError, match="scope 'layer'"):
            run(scope="global")
        with pytest.raises(SelectionError, match="several retain sets need"):
            run({"some": RETAIN_RECORDS}, criterion="difference")
        with pytest.raises(UnknownNameError, match="choose one of: attribution, circuit"):
            run(criterion="astrology")
        with pytest.raises(BudgetError, match="edges -1"):
            CircuitConfig(edges=-1)
        with pytest.raises(UnknownNameError, match="logic"):
            CircuitConfig(logic="fuzzy")
        with pytest.raises(UnknownNameError, match="granularity"):
            CircuitConfig(granularity="galaxy")

    def test_without_the_solver(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(__import__("sys").modules, "pysat.examples", None)
        with pytest.raises(CircuitError, match="python-sat"):
            discover(
                model,
                FORGET_RECORDS,
                {"retain": RETAIN_RECORDS},
                tokenizer=tokenizer,
                settings=SETTINGS,
                progress=False,
            )


def test_a_model_that_is_no_decoder() -> None:
    config = LlamaConfig(
        vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    del model.model.layers[0]
    with pytest.raises(CircuitError, match="no list of layers"):
        find_architecture(model)
