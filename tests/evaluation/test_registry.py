"""The registry of metrics: one from outside, in ten lines, is measured, saved and shown like those of the package."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from bench.files import read_section, write_section
from clue_fast.data import Record
from clue_fast.errors import UnknownNameError
from clue_fast.evaluation import METRICS, Metrics, compare, evaluate, metric, metric_title
from clue_fast.reporting import evaluation_table, read_metrics

PAGE = Path(__file__).parents[2] / "docs" / "evaluation.md"
SECTION = "metrics"


@pytest.fixture
def exact() -> Iterator[str]:
    @metric("exact answers", better="higher", better_forgotten="lower")
    def exact(metrics: Metrics) -> float:
        """Share of the records whose greedy answer is the right one, letter by letter."""
        pairs = zip(metrics.answers, metrics.records, strict=True)
        return sum(answer == record.completion for answer, record in pairs) / metrics.count

    yield "exact"
    del METRICS["exact"]


def test_a_metric_of_ones_own(
    exact: str, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "clue_fast.evaluation.measurement.answer_questions", lambda *_, **__: ["Ada", "ada", "Eve", "x"]
    )
    sets = {"forget": [Record("Who?", answer) for answer in ("Ada", "Ada", "Eve", "Eve")]}
    found = evaluate(model, tokenizer, sets, progress=False)
    assert found["forget"].value(exact) == 0.5
    assert found["forget"].subset([0, 2]).value(exact) == 1.0
    assert compare(found, found).row("forget", exact).after == 0.5
    assert any(line.split("|")[2].strip() == "exact answers" for line in compare(found, found).table().splitlines())
    saved = json.loads(json.dumps({name: metrics.as_dict() for name, metrics in found.items()}))
    assert saved["forget"][exact] == 0.5 and "records" not in saved["forget"]
    assert read_metrics(saved)["forget"].value(exact) == 0.5
    assert "exact answers" in evaluation_table({"model": {"forget": found["forget"].summary()}})


def test_a_metric_can_be_of_some_sets_only(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    @metric("count of forgotten", better="higher", better_forgotten="lower", sets="forgotten", name="how_many")
    def how_many(metrics: Metrics) -> float:
        """How many there are."""
        return float(metrics.count)

    try:
        sets = {name: [Record("Who?", "Ada")] for name in ("forget", "retain")}
        found = evaluate(model, tokenizer, sets, progress=False)
    finally:
        del METRICS["how_many"]
    assert (found["forget"].value("how_many"), found["retain"].value("how_many")) == (1.0, None)


def test_what_is_no_metric_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown direction 'up'; choose one of: higher, lower"):
        metric("x", better="up", better_forgotten="lower")
    with pytest.raises(ValueError, match="metric silent: its docstring should say what it is"):

        @metric("x", better="higher", better_forgotten="lower")
        def silent(metrics: Metrics) -> float:
            return 0.0

    assert "silent" not in METRICS


def table() -> str:
    """What stands in the page."""
    titled = ((metric_title(one.name, {"samples": "k", "relearned": "n"}), one) for one in METRICS.values())
    rows = [
        f"| `{one.name}` | {title} | {one.description} | {one.better}, {one.better_forgotten} "
        f"| {'yes' if one.default else ''} |"
        for title, one in titled
    ]
    head = "| metric | in the table | what it is | better on a set to keep, to forget | always |\n|---|---|---|---|---|"
    return "\n".join([head, *rows, ""])


def test_the_page_has_every_metric() -> None:
    assert read_section(PAGE, SECTION) == table()


if __name__ == "__main__":
    write_section(PAGE, SECTION, table())
