"""A default device of the user's (``torch.set_default_device``) changes nothing: every tensor names its own.

The default device here is "meta", whose tensors hold nothing: one that slips in ends what uses it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import clue_fast
from clue_fast.config import CircuitConfig
from clue_fast.data import Collator, encode
from clue_fast.demo.people import make_people, records_of
from clue_fast.demo.pretraining import Shape, TrainConfig, train_model, train_tokenizer
from clue_fast.objectives import RMU, Objective, get_objective
from clue_fast.selection import Selection

PEOPLE = make_people(3, seed=3)
FORGET, RETAIN = records_of(PEOPLE[:1])[:3], records_of(PEOPLE[1:])[:4]
PACKAGE = Path(clue_fast.__file__).parent
CONSTRUCTORS = {constructor.__name__ for constructor in _device_constructors()}


@pytest.mark.parametrize("file", sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")))
def test_every_tensor_that_is_made_names_its_device(file: str) -> None:
    unnamed = [
        f"line {node.lineno}: torch.{node.func.attr}"
        for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "torch"
        and node.func.attr in CONSTRUCTORS
        and not any(keyword.arg in ("device", None) for keyword in node.keywords)
    ]
    assert unnamed == []


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(FORGET + RETAIN, vocab_size=300)


def llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.device("cpu"):
        return LlamaForCausalLM(config).eval()


@pytest.fixture
def elsewhere() -> Iterator[None]:
    before = torch.get_default_device()
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None if before == torch.device("cpu") else before)


@pytest.mark.parametrize(
    "criterion", ["difference", "attribution", "fisher", "wanda", "wagle", "integrated_gradients", "random", "circuit"]
)
def test_localize(
    tokenizer: PreTrainedTokenizerFast, criterion: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = llama(len(tokenizer))
    options = {"tokenizer": tokenizer, "criterion": criterion, "progress": False}
    if criterion == "circuit":
        options["circuit"] = CircuitConfig(corruption="answer")
    expected = clue_fast.localize(model, FORGET, RETAIN, **options)
    request.getfixturevalue("elsewhere")
    found = clue_fast.localize(model, FORGET, RETAIN, **options)
    found.save(tmp_path / "selection.safetensors")
    assert expected.hash == found.hash == Selection.load(tmp_path / "selection.safetensors", model).hash


def test_evaluate(tokenizer: PreTrainedTokenizerFast, request: pytest.FixtureRequest) -> None:
    model = llama(len(tokenizer))
    options = {"samples": 2, "progress": False}
    expected = clue_fast.evaluate(model, tokenizer, {"forget": FORGET}, **options)
    request.getfixturevalue("elsewhere")
    assert clue_fast.evaluate(model, tokenizer, {"forget": FORGET}, **options) == expected


@pytest.mark.parametrize("objective", ["simnpo", "npo", "gradient_difference", RMU(layer=0)])
@pytest.mark.parametrize("stochastic", [False, True])
def test_training_steps(
    tokenizer: PreTrainedTokenizerFast, objective: str | Objective, stochastic: bool, request: pytest.FixtureRequest
) -> None:
    def trained() -> dict[str, torch.Tensor]:
        model = llama(len(tokenizer))
        selection = clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, progress=False)
        batches = {name: Collator(0)(encode(records, tokenizer)) for name, records in sets.items()}
        with clue_fast.sparsify(model, selection) as sparse:
            optimizer = clue_fast.SparseAdamW(
                model, lr=1e-2, master_weights=not stochastic, stochastic_rounding=stochastic
            )
            for _ in range(2):
                get_objective(objective).loss(model, batches, sparse)[0].backward()
                optimizer.step()
                optimizer.zero_grad()
        return model.state_dict()

    sets = {"forget": FORGET, "retain": RETAIN}
    expected = trained()
    request.getfixturevalue("elsewhere")
    assert all(torch.equal(value, expected[name]) for name, value in trained().items())


def test_the_model_of_the_demo(tokenizer: PreTrainedTokenizerFast, elsewhere: None) -> None:
    shape, config = Shape(layers=1, width=16, units=32, heads=2), TrainConfig(epochs=1)
    model = train_model(FORGET, tokenizer, shape=shape, config=config, progress=False)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
