"""What an evaluation measures once: real TOFU questions, what is missing, another tokenizer, and going on after an
interruption."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from clue_fast.data import Record, load_records
from clue_fast.demo.pretraining import train_tokenizer
from clue_fast.errors import DataError, OutputError, UnknownNameError
from clue_fast.evaluation import Metrics, check_tokenizers, evaluate, evaluate_model, score_answers
from clue_fast.reporting import evaluation_table


@pytest.fixture(scope="module")
def tofu(data_dir: Path) -> dict[str, list[Record]]:
    files = {
        "forget": "forget01_perturbed",
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
    }
    return {name: load_records(data_dir / "tofu" / f"{file}.json", name)[:5] for name, file in files.items()}


def harmonic(values: list[float]) -> float:
    return len(values) / sum(1 / value for value in values)


def test_model_utility_on_questions_of_tofu(
    tofu: dict[str, list[Record]], model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch
) -> None:
    """The model knows nothing, so that every second right answer is put into its mouth."""

    def answers(_, __, questions: list[object], description: str, **___) -> list[str]:
        records = tofu[description.partition(":")[0]]
        return [record.completion if number % 2 else "the" for number, record in enumerate(records)]

    monkeypatch.setattr("clue_fast.evaluation.measurement.answer_questions", answers)
    for records in tofu.values():
        assert all(record.perturbed for record in records)
    found = evaluate(model, tokenizer, tofu, metrics=["model_utility", "option_probability"], progress=False)
    nine = []
    for name in ("retain", "real_authors", "world_facts"):
        probabilities = []
        for record in tofu[name]:
            answers = [record.completion, *record.perturbed]
            asked = [Record(record.prompt, answer) for answer in answers]
            likely = [
                2.718281828459045**-score.loss for score in score_answers(model, tokenizer, asked, progress=False)
            ]
            probabilities.append(likely[0] if name == "retain" else likely[0] / sum(likely))
        if name != "retain":
            assert found[name].value("option_probability") == pytest.approx(fmean(probabilities), rel=1e-4)
        nine += [fmean(probabilities), fmean(found[name].rouge_recalls), found[name].truth_ratio]
    assert min(nine) > 0.0
    assert found["retain"].value("model_utility") == pytest.approx(harmonic(nine), rel=1e-4)
    assert found["forget"].value("model_utility") is found["world_facts"].value("model_utility") is None


def test_missing_inputs_are_named(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    sets = {"forget": records, "retain": [records[0], Record("Who?", "Ada.")]}
    found = evaluate(model, tokenizer, sets, metrics="all", progress=False)
    assert (
        found["retain"].skipped
        == {
            "truth_ratio": "1 of 2 records have no wrong answers (column perturbed_answer)",
            "option_probability": "1 of 2 records have no wrong answers (column perturbed_answer)",
            "model_utility": "the set retain: 1 of 2 records have no wrong answers (column perturbed_answer)",
        }
        or found["retain"].skipped["model_utility"] == 'no set "real_authors"'
    )
    table = evaluation_table({"model": {name: metrics.summary() for name, metrics in found.items()}})
    assert (
        "skipped: truth ratio, probability among options (retain): 1 of 2 records have no wrong answers "
        "(column perturbed_answer)" in table.splitlines()
    )
    assert json.loads(json.dumps(found["retain"].as_dict()))["skipped"] == found["retain"].skipped
    with pytest.raises(UnknownNameError, match="unknown metric 'luck'; choose one of: accuracy, all"):
        evaluate(model, tokenizer, sets, metrics=["luck"], progress=False)


def test_further_metrics_are_not_in_the_table_unless_named(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    found = evaluate(model, tokenizer, {"forget": records}, progress=False)["forget"]
    assert (found.further, found.values, found.skipped) == ({}, {}, {})


def test_a_retrained_model_of_another_tokenizer_is_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    other = train_tokenizer(records, vocab_size=280)
    known = evaluate(model, other, {"forget": records}, progress=False)
    with pytest.raises(DataError, match="the forget set has other tokens for the retrained model"):
        evaluate(model, tokenizer, {"forget": records}, retrained=known, progress=False)
    with pytest.raises(DataError, match="it has another tokenizer"):
        check_tokenizers({"forget": records}, tokenizer, other)
    check_tokenizers({"forget": records}, tokenizer, copy.deepcopy(tokenizer))
    saved = {name: Metrics.from_dict(metrics.as_dict()) for name, metrics in known.items()}
    with pytest.raises(DataError, match="retrain with the same one"):
        evaluate(model, tokenizer, {"forget": records}, retrained=saved, progress=False)


def test_side_by_side_with_a_retrained_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    torch.manual_seed(1)
    retrained = LlamaForCausalLM(model.config).eval()
    others = [Record(f"Who came {when}?", "Eve and Ada.") for when in ("first", "last", "late")]
    found = evaluate_model(
        model,
        tokenizer,
        forget=records,
        retain=others[:1],
        unseen=others[1:],
        text="Ada and her two sons built the quay.",
        retrained=retrained,
        metrics=("privacy_leakage", "forget_quality"),
        progress=False,
    )
    assert {"privacy_leakage", "forget_quality"} <= found["model"]["forget"].keys()
    assert "forget_quality" not in found["retrained"]["forget"]
    lines = [line.split() for line in evaluation_table(found).splitlines()]
    assert any(line[:2] == ["text", "perplexity"] and len(line) == 4 for line in lines)
    assert any(line[:3] == ["forget", "privacy", "leakage"] and line[-1] == "-" for line in lines)
    with pytest.raises(DataError, match="unseen"):
        evaluate_model(model, tokenizer, forget=records, retain=others, unseen=others[1:], progress=False)


class TestCache:
    def sets(self, records: list[Record]) -> dict[str, list[Record]]:
        return {"forget": records[:2], "retain": records[2:]}

    def measured(self, model, tokenizer, records, folder, **options) -> dict[str, Metrics]:
        options = {"samples": 2, "relearn": {"forget": 1}, "metrics": "all", "max_new_tokens": 6, **options}
        return evaluate(model, tokenizer, self.sets(records), cache=folder, progress=False, **options)

    @pytest.fixture
    def asked(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        """How many records were scored, by set that was measured."""
        from clue_fast.evaluation import measurement

        asked: list[int] = []
        score = measurement.score_examples

        def counted(model, tokenizer, examples, **options):
            asked.append(len(examples))
            return score(model, tokenizer, examples, **options)

        monkeypatch.setattr(measurement, "score_examples", counted)
        return asked

    def test_an_interrupted_evaluation_goes_on(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        records: list[Record],
        tmp_path: Path,
        asked: list[int],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        from clue_fast.evaluation import measurement

        whole = self.measured(model, tokenizer, records, None)
        asked.clear()
        with monkeypatch.context() as patch:
            answer = measurement.answer_questions
            patch.setattr(
                measurement,
                "answer_questions",
                lambda *given, **named: interrupt() if "retain" in named["description"] else answer(*given, **named),
            )
            with pytest.raises(KeyboardInterrupt):
                self.measured(model, tokenizer, records, tmp_path / "cache")
        assert asked == [2, 2]
        assert [json.loads(file.read_text())["set"] for file in (tmp_path / "cache").iterdir()] == ["forget"]
        asked.clear()
        found = self.measured(model, tokenizer, records, tmp_path / "cache")
        assert asked == [2]
        assert found == whole
        assert [one.scores for one in found.values()] == [one.scores for one in whole.values()]
        asked.clear()
        assert self.measured(model, tokenizer, records, tmp_path / "cache") == whole
        assert asked == []

    def test_what_has_changed_is_measured_anew(
        self,
        model: LlamaForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        records: list[Record],
        tmp_path: Path,
        asked: list[int],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def times(**changed) -> int:
            asked.clear()
            given = {"model": model, "records": records, **changed}
            self.measured(given.pop("model"), tokenizer, given.pop("records"), tmp_path, **given)
            return len(asked)

        assert times() == 2
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-6
        assert times(model=other) == 2
        assert times(seed=1) == 2
        assert times(records=[*records[:3], Record("Why?", "So.", perturbed=("No.",))]) == 1
        assert times(metrics=["membership_loss"]) == 2  # without what min-k++ and the prefixes need
        assert times(metrics=["membership_zlib"]) == 0
        assert times() == 0
        for file in tmp_path.iterdir():
            file.write_text(file.read_text()[:100])
        with caplog.at_level(logging.WARNING, "clue_fast"):
            assert times() == 2
        assert "cannot be read" in caplog.text

    def test_a_file_in_its_place_is_refused(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], tmp_path: Path
    ) -> None:
        (tmp_path / "cache").write_text("")
        with pytest.raises(OutputError, match="cannot be made one"):
            self.measured(model, tokenizer, records, tmp_path / "cache")


def interrupt() -> Mapping[str, str]:
    raise KeyboardInterrupt
