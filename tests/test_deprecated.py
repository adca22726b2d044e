"""Old names work for one release: each warns once and says the new one."""

from __future__ import annotations

import importlib
import inspect
import warnings
from typing import Any

import pytest
import torch

import clue_fast
from clue_fast import ops
from clue_fast.demo.pretraining import train_model
from clue_fast.deprecated import precision, renamed_arguments
from clue_fast.errors import UnknownNameError
from clue_fast.evaluation import Row, compare, evaluate_model
from clue_fast.sites import ParamSlice, Unmatched
from clue_fast.trainer import MemoryEstimate, scale_update
from tests.models.small_llama import llama, random_selection

STOCHASTIC = {"master_weights": False, "stochastic_rounding": True}


@renamed_arguments(master=precision, lead="expert_index")
def called(first: int, *, expert_index: int = 0, master_weights: bool = True, stochastic_rounding: bool = False) -> Any:
    """Says what arrived."""
    return first, expert_index, master_weights, stochastic_rounding


@pytest.mark.parametrize(
    ("given", "arrived", "said"),
    [
        ({"master": "fp32"}, (1, 0, True, False), "master_weights=True, stochastic_rounding=False"),
        ({"master": "stochastic"}, (1, 0, False, True), "master_weights=False, stochastic_rounding=True"),
        ({"lead": 3}, (1, 3, True, False), "expert_index"),
    ],
)
def test_an_argument_by_its_old_name(given: dict[str, Any], arrived: tuple[Any, ...], said: str) -> None:
    (old,) = given
    with pytest.warns(FutureWarning, match=f"the argument {old} of called is {said} now") as caught:
        assert called(1, **given) == arrived
    assert len(caught) == 1 and caught[0].filename == __file__


def test_new_names_say_nothing_and_both_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert called(1, expert_index=2) == (1, 2, True, False)
    with pytest.raises(TypeError, match="called got lead and expert_index; leave out lead"):
        called(1, lead=1, expert_index=1)
    with pytest.raises(UnknownNameError, match="unknown master 'bf16'; choose one of: fp32, stochastic"):
        called(1, master="bf16")


@pytest.mark.parametrize(
    ("function", "old", "new"),
    [
        (ParamSlice, {"lead": 1}, {"expert_index": 1}),
        (clue_fast.Site, {"parts": ()}, {"slices": ()}),
        (clue_fast.unlearn, {"master": "stochastic"}, STOCHASTIC),
        (clue_fast.unlearn, {"reference": None}, {"retrained": None}),
        (evaluate_model, {"reference": None}, {"retrained": None}),
        (compare, {"reference": None}, {"retrained": None}),
        (train_model, {"recipe": None}, {"config": None}),
        (scale_update, {"enough": None}, {"predicate": None}),
        (ops.sparse_linear, {"selected": 0}, {"values": 0}),
        (ops.sparse_linear, {"selected_bias": 0}, {"bias_values": 0}),
        (clue_fast.SparseAdamW, {"master": "stochastic"}, STOCHASTIC),
        (clue_fast.SparseSGD, {"master": "stochastic"}, STOCHASTIC),
        (clue_fast.UnlearnTrainer, {"master": "stochastic"}, STOCHASTIC),
        (clue_fast.attach, {"master": "stochastic"}, STOCHASTIC),
        (clue_fast.estimate_memory, {"master": "stochastic"}, {"master_weights": False}),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_public_functions_take_the_old_names(function: Any, old: dict[str, Any], new: dict[str, Any]) -> None:
    """As far as the warning: what else they need is not given."""
    assert set(new) <= set(inspect.signature(function).parameters)
    with pytest.warns(FutureWarning) as caught, pytest.raises((TypeError, AttributeError)):
        function(None, None, **old) if function is clue_fast.attach else function(**old)
    for name in old:
        assert any(f"the argument {name} of {function.__name__} is" in str(w.message) for w in caught)


SLICE = ParamSlice("experts.down", 0, expert_index=2)
ROW = Row("forget", "loss", "answer loss", 1.0, 2.0, 3.0)
SITE = clue_fast.Site("mlp", "mlp", 4, 0, slices=(SLICE,))


@pytest.mark.parametrize(
    ("holder", "old", "new"),
    [
        ("clue_fast.sites", "Part", "ParamSlice"),
        ("clue_fast.evaluation", "COMPARED", "METRICS"),
        (ROW, "reference", "retrained"),
        ("clue_fast.sparse", "TrainedPart", "TrainableSlice"),
        (SLICE, "lead", "expert_index"),
        (SITE, "parts", "slices"),
        (Unmatched("mlp", "Gate", "it is one"), "rehearsed", "traced"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_names_and_attributes_are_found_by_their_old_names(holder: Any, old: str, new: str) -> None:
    holder = importlib.import_module(holder) if isinstance(holder, str) else holder
    with pytest.warns(FutureWarning, match=f"{old} is .*{new} now") as caught:
        assert getattr(holder, old) == getattr(holder, new)
    assert len(caught) == 1 and caught[0].filename == __file__


@pytest.mark.parametrize("old", ["sparse_adamw", "sparse_sgd"])
def test_operators_are_chosen_by_their_old_names(old: str) -> None:
    with pytest.warns(FutureWarning, match=f"the operator {old} is sparse_optimizer now") as caught:
        assert ops.choose(old, "cpu") == ops.choose("sparse_optimizer", "cpu")
    assert len(caught) == 1 and caught[0].filename == __file__


def test_the_table_of_operators_by_its_old_name() -> None:
    """The table of backends has its name still, and holds the same names."""
    with pytest.warns(FutureWarning, match=r"ops.backend.OPERATORS is .*operators\(\) now") as caught:
        table = ops.backend.OPERATORS
    assert len(caught) == 1 and caught[0].filename == __file__
    assert table == ops.backend.operators() | dict.fromkeys(
        ("sparse_adamw", "sparse_sgd"), ops.backend.operators()["sparse_optimizer"]
    )
    assert tuple(ops.BACKENDS) == ("reference", "cpp", "triton", "cuda")
    with pytest.raises(AttributeError, match="no attribute 'OPERATOR'"):
        ops.backend.OPERATOR  # noqa: B018


def test_files_keep_the_names_that_they_have() -> None:
    assert SITE.as_dict()["parts"][0]["lead"] == 2
    assert clue_fast.Site.from_dict(SITE.as_dict()) == SITE


def test_a_sparse_model_by_its_old_names() -> None:
    model = llama(torch.bfloat16, layers=1)
    with clue_fast.sparsify(model, random_selection(model, units=2)) as sparse:
        optimizer = clue_fast.SparseAdamW(model)
        with pytest.warns(FutureWarning, match=r"Sparse.parts is slices now"):
            part = sparse.parts[0]
        for holder, old, new in (
            (part, "selected", "values"),
            (part, "lead", "expert_index"),
            (part, "has_master", "has_values"),
            (part, "master_name", "values_name"),
            (sparse, "reach", "set_batch_layout"),
            (optimizer, "follow", "rebuild_param_groups"),
        ):
            with pytest.warns(FutureWarning, match=f"{old} is {new} now"):
                value = getattr(holder, old)
            assert value is getattr(holder, new) or value == getattr(holder, new)
        with pytest.warns(FutureWarning, match=r"Sparse.bytes is memory_footprint now"):
            found = sparse.bytes(optimizer)
        assert found.pop("trainable") == sparse.memory_footprint(optimizer)["values"] > 0
        estimate = MemoryEstimate(*range(7))
        with pytest.warns(FutureWarning, match="MemoryEstimate.masters is values now"):
            assert estimate.masters == estimate.values == 1
