"""Perplexity window by window, and what counts as gibberish."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from clue_fast.data import Record
from clue_fast.errors import DataError, SettingError
from clue_fast.evaluation import evaluate, is_gibberish, perplexity

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

TEXT = "Ada and her two sons built the quay, of course. It is in Orvandel, at sea, for the salt and for nothing else. "


def slow_perplexity(model: LlamaForCausalLM, ids: list[int], window: int) -> float:
    """Token by token, each from those before it in its window."""
    total, count = 0.0, 0
    for place in range(len(ids)):
        begin = place // window * window
        if place == begin:
            continue
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[begin:place]])).logits[0, -1].double()
        total -= float(torch.log_softmax(logits, -1)[ids[place]])
        count += 1
    return math.exp(total / count)


def test_perplexity_token_by_token(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    for window in (7, len(ids)):
        found = perplexity(model, tokenizer, TEXT, window=window, batch_size=2, progress=False)
        assert found == pytest.approx(slow_perplexity(model, ids, window), rel=1e-5)
    first = perplexity(model, tokenizer, TEXT, window=7, tokens=10, progress=False)
    assert first == pytest.approx(slow_perplexity(model, ids[:10], 7), rel=1e-5)
    with pytest.raises(DataError, match="no token that is predicted"):
        perplexity(model, tokenizer, "", progress=False)


def test_perplexity_of_a_trained_model_on_real_text(data_dir: Path) -> None:
    """BabyLlama learned children's stories letter by letter: Wikipedia is far from them, and nearer than letters at
    random, of which there are 105."""
    from convert_llama2c import read_llama2c
    from planted_truth import read_vocabulary

    folder = data_dir / "models" / "babyllama_tok105"
    model = read_llama2c(folder / "model5000.bin").eval()
    vocabulary = read_vocabulary(folder / "tok105.model")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    letters = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    text = (data_dir / "wikitext2" / "test.txt").read_text(encoding="utf-8")[:1500].replace("<unk>", "it")
    text = "".join(letter for letter in "\u2581".join(text.split()) if letter in vocabulary)[:200]
    ids = letters(text, add_special_tokens=False)["input_ids"]
    assert ids == [vocabulary[letter] for letter in text]
    found = perplexity(model, letters, text, window=100, batch_size=2, progress=False)
    assert found == pytest.approx(slow_perplexity(model, ids, 100), rel=1e-4)
    assert 1.0 < found < 105


def test_a_general_text_is_a_set_of_its_own(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    found = evaluate(model, tokenizer, {"forget": records}, text=TEXT, max_length=40, progress=False)
    assert found["text"].further == {
        "perplexity": pytest.approx(perplexity(model, tokenizer, TEXT, window=40, progress=False))
    }
    assert found["text"].value("answered") is None and "answered" not in found["text"].as_dict()
    assert type(found["text"]).from_dict(found["text"].as_dict()).value("perplexity") is not None
    assert "perplexity" not in found["forget"].further
    with pytest.raises(SettingError, match="a set is named 'text'"):
        evaluate(model, tokenizer, {"text": records}, text=TEXT, progress=False)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("", False),
        ("Paris", False),
        ("The capital of France is Paris, and that of Spain is Madrid.", False),
        ("法国的首都是巴黎。", False),
        ("the the the the the the the", True),
        ("in Paris and in Paris and in Paris and in Paris and in Paris and in Paris", True),
        ("She said no, and he said no, and that was that.", False),
        ("?!?!?! ... ###", True),
        ("\ufffd\ufffd\ufffd\ufffd a", True),
        ("3.14159", False),
    ],
)
def test_gibberish(answer: str, expected: bool) -> None:
    assert is_gibberish(answer) is expected


def test_share_of_gibberish(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty answer recalls nothing, and is no gibberish."""
    answers = ["", "go go go go go go", "It is Ada.", "####"]
    monkeypatch.setattr("clue_fast.evaluation.measurement.answer_questions", lambda *_, **__: answers)
    sets = {"forget": [Record("Who?", "Ada.")] * 4}
    found = evaluate(model, tokenizer, sets, metrics=["gibberish"], progress=False)["forget"]
    assert (found.value("gibberish"), found.values["gibberish"]) == (0.5, [0.0, 1.0, 0.0, 1.0])
    assert found.rouge_recalls == [0.0, 0.0, 1.0, 0.0]
