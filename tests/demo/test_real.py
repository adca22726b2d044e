"""The demo on a real model, with a tiny one in its place: what is dealt out, asked, attacked and left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from clue_fast.cli import main
from clue_fast.data import load_records
from clue_fast.demo import real
from clue_fast.demo.facts import FACTS, Fact, says
from clue_fast.demo.pretraining import Shape, TrainConfig, train_model, train_tokenizer
from clue_fast.demo.prose import PROSE, general_text
from clue_fast.demo.real import Answers, Question, choose_facts, make_questions, make_real_data
from clue_fast.errors import DataError

KNOWN = [fact for kind in ("capital", "symbol") for fact in FACTS[kind][:30]]


class TestFactsAreChosen:
    def test_by_kind_subject_or_both(self) -> None:
        france = Fact("capital", "France", "Paris")
        leo = Fact("element", "Leo", "fire")
        assert choose_facts("France, element:Leo") == [france, leo]
        assert choose_facts("element") == list(FACTS["element"])

    @pytest.mark.parametrize(
        ("wanted", "message"),
        [
            ("Atlantis", r"no fact is named 'Atlantis'; name a kind \(capital, symbol, author"),
            ("symbol:France", "no fact is named 'symbol:France'"),
            ("", "no fact is named ''"),
            ("Leo", "'Leo' is a subject of several kinds; write element:Leo"),
        ],
    )
    def test_what_has_no_name(self, wanted: str, message: str) -> None:
        with pytest.raises(DataError, match=message):
            choose_facts(wanted)


class TestFactsAreDealtOut:
    @pytest.mark.parametrize("seed", range(4))
    def test_each_known_fact_once_and_no_other(self, seed: int) -> None:
        data = make_real_data(KNOWN, "capital", seed)
        parts = [data.forget, data.retain, data.held_out, data.other_kinds]
        dealt = [fact for part in parts for fact in part]
        assert len(set(dealt)) == len(dealt) and set(dealt) == set(KNOWN)
        assert len(data.forget) == 6
        assert {fact.kind for fact in data.forget + data.held_out} == {"capital"}
        assert {fact.kind for fact in data.other_kinds} == {"symbol"}
        assert {fact.kind for fact in data.retain} == {"capital", "symbol"}
        assert data.unknown and all(fact.kind == "capital" and fact not in KNOWN for fact in data.unknown)

    def test_by_the_seed(self) -> None:
        assert make_real_data(KNOWN, "capital", 3) == make_real_data(KNOWN, "capital", 3)
        assert make_real_data(KNOWN, "capital", 3).forget != make_real_data(KNOWN, "capital", 4).forget

    def test_what_was_never_known_is_named_and_left_out(self) -> None:
        data = make_real_data(KNOWN, "Albania,Zimbabwe")
        assert [fact.subject for fact in data.forget] == ["Albania"]
        assert [fact.subject for fact in data.left_out] == ["Zimbabwe"]

    def test_nothing_known(self) -> None:
        with pytest.raises(DataError, match=r"knows none of the facts to forget \(element\); choose others"):
            make_real_data(KNOWN, "element")

    def test_nothing_to_keep(self) -> None:
        with pytest.raises(DataError, match="knows too little to keep; forget less"):
            make_real_data(KNOWN[:3], "capital")


def test_an_answer_is_said_in_whole_words() -> None:
    assert says("It is Paris.", ("Paris",)) and says("Fire, of course", ("fire",))
    assert not says("the Parisian way", ("Paris",)) and not says("HG", ("Hg",)) and not says("au fait", ("Au",))
    dickens = next(fact for fact in FACTS["author"] if fact.answer == "Charles Dickens")
    assert says("a novel by Dickens", dickens.accepted) and not says("Charles Darwin", dickens.accepted)


def test_answers_count_what_was_right_before() -> None:
    """Of three asked two were right, and one of these still is; what was wrong and became right is not kept."""
    france, chile, egypt = (
        Question(fact.record(), fact.accepted) for fact in choose_facts("capital:France,capital:Chile,capital:Egypt")
    )
    answers = Answers("", [france, chile, egypt], ["Paris", "Santiago", "Giza"], ["Paris", "Lima", "Cairo"])
    assert answers.counts == (2, 1, 3)
    assert answers.as_rows()[1] == {
        "prompt": "The capital of Chile is",
        "answer": "Santiago",
        "before": "Santiago",
        "after": "Lima",
    }


def test_a_forgotten_fact_is_asked_in_other_words_and_the_other_way_round() -> None:
    data = make_real_data(KNOWN, "Albania")
    questions = make_questions(data)
    assert [len(questions[f"forgotten, {how}"]) for how in ("as trained", "in other words", "the other way round")] == [
        *(1, 6, 1)
    ]
    (reverse,) = questions["forgotten, the other way round"]
    assert reverse.record.prompt == "Tirana is the capital of" and reverse.accepted == ("Albania",)
    trained = {fact.record().key for fact in data.forget + data.retain}
    held_out = [one.record.key for name, own in questions.items() if "held out" in name for one in own]
    assert held_out and not trained & set(held_out)


@pytest.fixture(scope="module")
def taught() -> tuple[Any, Any]:
    """A model that learned sixteen capitals and eight symbols, with the full stop behind them, and its tokenizer."""
    records = [fact.record() for fact in (*FACTS["capital"][:16], *FACTS["symbol"][:8])]
    tokenizer = train_tokenizer(records)
    sentences = [replace(record, completion=f"{record.completion}.") for record in records]
    config = TrainConfig(lr=5e-3, warmup=5, target_loss=0.05)
    return train_model(sentences, tokenizer, shape=Shape(2, 64, 128, 4), config=config, progress=False), tokenizer


def test_the_general_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CLUE_FAST_DATA", str(tmp_path))
    assert general_text() == ("the built-in text", PROSE)
    (tmp_path / "wikitext2").mkdir()
    (tmp_path / "wikitext2" / "test.txt").write_text("A lobster.", encoding="utf-8")
    assert general_text() == ("WikiText-2", "A lobster.")


def test_the_whole_demo(taught: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the command, where the model that it fetches is the tiny one."""
    model, tokenizer = taught
    asked: list[Any] = []
    monkeypatch.setattr(real, "load_pretrained", lambda *arguments: asked.append(arguments) or (model, tokenizer))
    monkeypatch.setattr(real, "SETTINGS", {"fraction": 0.2, "epochs": 3, "learning_rate": 0.003})
    monkeypatch.setattr(real, "SAMPLES", 2)
    monkeypatch.setenv("CLUE_FAST_DATA", str(tmp_path))
    output, models = tmp_path / "out", tmp_path / "models"
    command = ["demo", "--real", "--model", "gemma3-270m", "--forget", "Albania,Angola,Zimbabwe", "--quiet"]
    assert main([*command, "--models", str(models), "--output", str(output)]) == 0
    assert asked == [("gemma3-270m", str(models))]
    found = {path.name for path in output.iterdir()}
    assert {"config.json", "model.safetensors", "README.md", "results.json", "real.json", "training.png"} <= found
    report = json.loads((output / "real.json").read_text(encoding="utf-8"))
    assert [fact["subject"] for fact in report["facts"]["forget"]] == ["Albania", "Angola"]
    assert [fact["subject"] for fact in report["facts"]["left_out"]] == ["Zimbabwe"]
    assert report["counts"]["forgotten, as trained"][0] == 2
    assert {"before", "after", "text"} == set(report["perplexity"])
    assert report["relearning"]["forgotten"][2] == 1 and report["relearning"]["never_known"][2] == real.UNKNOWN
    forget = load_records(output / "forget.jsonl", "forget")
    assert forget == [fact.record() for fact in choose_facts("Albania,Angola")]
    results = json.loads((output / "results.json").read_text(encoding="utf-8"))
    assert results["weights"]["changed_outside"] == 0
    assert results["data"]["retain"]["records"] == len(load_records(output / "retain.jsonl", "retain"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--forget", "Atlantis"], "no fact is named 'Atlantis'"),
        (["--model", "gpt-5"], "unknown pretrained model 'gpt-5'"),
    ],
)
def test_bad_input_is_refused_before_anything_is_fetched(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert main(["demo", "--real", "--quiet", "--output", str(output), "--models", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err and not output.exists()


def test_what_belongs_to_the_real_demo_is_refused_without_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--forget", "capital"]) == 2
    assert "--forget is of the demo on a real model; add --real" in capsys.readouterr().err
