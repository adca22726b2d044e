"""The whole path and the command line: what comes out, and what bad input ends with."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

import clue_fast
from clue_fast.cli import main
from clue_fast.data import Record, data_hash
from clue_fast.demo import write_jsonl
from clue_fast.demo.people import make_people, records_of
from clue_fast.demo.pretraining import Shape, TrainConfig, train_model, train_tokenizer
from clue_fast.errors import DataError, NonFiniteError, OutputError, SelectionError, SettingError
from clue_fast.files import tensors_hash
from clue_fast.html_report import html_report
from clue_fast.reporting import results_table
from clue_fast.run import Run
from clue_fast.selection import Selection
from clue_fast.trainer import Stage
from clue_fast.trainer.update_scale import Asked

PEOPLE = make_people(8, seed=1)
FORGET, RETAIN, HELD_OUT = (records_of(PEOPLE[part]) for part in (slice(0, 1), slice(1, 6), slice(6, 8)))
SHAPE = Shape(layers=2, width=64, units=160)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(FORGET + RETAIN + HELD_OUT, vocab_size=600)


@pytest.fixture(scope="session")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has memorized 8 people, with its data as JSON lines beside it."""
    folder = tmp_path_factory.mktemp("inputs")
    everything = FORGET + RETAIN + HELD_OUT
    config = TrainConfig(epochs=80, batch_size=8, lr=5e-3, target_loss=0.02)
    train_model(everything, tokenizer, shape=SHAPE, config=config, progress=False).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, records in {"forget": FORGET, "retain": RETAIN, "held_out": HELD_OUT}.items():
        write_jsonl(folder / f"{name}.jsonl", records)
    return folder


@pytest.fixture
def model(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder / "model")


def unlearn_arguments(folder: Path, output: Path, **changes: str) -> list[str]:
    """Arguments of `clue-fast unlearn`, some of them changed."""
    options = {
        "forget": str(folder / "forget.jsonl"),
        "retain": str(folder / "retain.jsonl"),
        "output": str(output),
        "epochs": "2",
        **changes,
    }
    model = options.pop("model", str(folder / "model"))
    return ["unlearn", model, "--quiet", *(part for name, value in options.items() for part in (f"--{name}", value))]


def test_records_and_text_that_are_only_asked(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    strangers = records_of(make_people(1, seed=5))
    write_jsonl(tmp_path / "unseen.jsonl", strangers)
    text = "The river rose slowly at first, and then it stood in the gardens."
    (tmp_path / "text.txt").write_text(text)
    more = {"unseen": f"{tmp_path}/unseen.jsonl", "text": f"{tmp_path}/text.txt", "metrics": "membership_loss"}
    assert main(unlearn_arguments(folder, tmp_path / "out", epochs="1", **more)) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    evaluation = results["evaluation"]
    assert list(evaluation["after"]) == ["forget", "retain", "unseen", "text"]
    assert evaluation["before"]["forget"]["membership_loss"] == 1.0
    loss = float(
        model(**tokenizer(text, return_tensors="pt"), labels=tokenizer(text, return_tensors="pt").input_ids).loss
    )
    assert evaluation["before"]["text"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert results["data"]["unseen"] == {"records": len(strangers), "hash": data_hash(strangers)}
    assert "text" not in results["data"]
    ratio = evaluation["after"]["text"]["perplexity"] / evaluation["before"]["text"]["perplexity"]
    assert f"perplexity on the text: {ratio:.3f} of before" in results_table(results)
    assert "recall kept on unseen" not in results_table(results)
    given = {"forget": FORGET, "retain": RETAIN, "output_dir": tmp_path / "no"}
    with pytest.raises(DataError, match="unseen"):
        clue_fast.unlearn(model, tokenizer, **given, unseen=RETAIN[:1])
    assert not (tmp_path / "no").exists()


def test_unlearn_forgets_and_leaves_a_plain_checkpoint(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    original = {name: value.clone() for name, value in model.state_dict().items()}
    result = clue_fast.unlearn(
        model,
        tokenizer,
        forget=folder / "forget.jsonl",
        retain=RETAIN,
        held_out=HELD_OUT,
        retrained=LlamaForCausalLM(model.config),
        output_dir=tmp_path / "out",
        fraction=0.1,
        epochs=40,
        batch_size=5,
        evaluate_every=10,
        progress=False,
    )
    evaluation = result.results["evaluation"]
    assert evaluation["before"]["forget"]["answered"] == 1.0
    assert evaluation["after"]["forget"]["answered"] <= 0.2
    assert evaluation["after"]["retain"]["rouge_recall"] >= 0.9 * evaluation["before"]["retain"]["rouge_recall"]
    assert set(evaluation) == {"before", "after", "retrained"}
    units = result.results["selection"]
    assert result.results["settings"]["criterion"] == "attribution"
    share = units["units"] / units["of"]
    rate = 0.4 / model.config.hidden_size / share**0.5
    assert result.results["settings"]["learning_rate"] == pytest.approx(rate)

    written = {path.name for path in (tmp_path / "out").iterdir()}
    plots = {"selection.png", "scores.png", "training.png"}
    assert written >= {"config.json", "model.safetensors", "selection.safetensors", "results.json", "README.md"} | plots
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    card = (tmp_path / "out" / "README.md").read_text()
    assert results["data"]["forget"] == {"records": 5, "hash": data_hash(FORGET)} and data_hash(FORGET) in card
    assert not any(record.prompt in card or record.completion in card for record in FORGET + RETAIN + HELD_OUT)
    assert clue_fast.Selection.from_pretrained(tmp_path / "out", model).hash == result.selection.hash
    assert results_table(results) == result.table()
    assert (tmp_path / "out" / "report.html").read_text() == html_report({"out": results})
    assert results["records"]["held_out"] == [{"question": r.prompt, "answer": r.completion} for r in HELD_OUT]
    assert sum(site["selected"] for site in results["selection"]["sites"]) == results["selection"]["units"]
    names = [name for name, _ in model.named_parameters()]
    hashes = [tensors_hash({name: own[name] for name in names}) for own in (original, model.state_dict())]
    assert list(results["weights"]["hash"].values()) == hashes and hashes[0] != hashes[1]
    assert results["selection"]["reliability"]["of"] == 31 and "reliability" not in results["settings"]
    assert result.selection.reliability.sentence in result.table().splitlines()
    assert "weights changed outside the selection: 0" in result.table()
    steps = [entry["step"] for entry in results["history"]]
    assert steps == sorted(steps)
    assert {"forget_loss", "retain_loss"} <= results["history"][-2].keys() | results["history"][-1].keys()
    assert any("held_out_recall" in entry for entry in results["history"])

    stock = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    tokens = torch.arange(40).reshape(2, 20)
    assert torch.equal(stock(tokens).logits, model(tokens).logits)
    changed = {name for name, value in stock.state_dict().items() if not torch.equal(value, original[name])}
    assert changed == {
        f"model.layers.{layer}.mlp.{name}_proj.weight" for layer in range(2) for name in ("gate", "up", "down")
    }
    assert type(model.model.layers[0].mlp.gate_proj) is torch.nn.Linear


def test_the_whole_update_is_kept_unless_a_target_is_asked_for(folder: Path, tokenizer, tmp_path: Path) -> None:
    """With a target, half of the forget questions decide, and the table has the other half before and after."""
    results = {}
    reworded = [replace(record, paraphrased_prompt=f"Say: {record.prompt}") for record in FORGET]
    for target in (None, 0.5):
        model = LlamaForCausalLM.from_pretrained(folder / "model")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        settings = {"forget": reworded, "retain": RETAIN, "held_out": HELD_OUT, "epochs": 20, "progress": False}
        asked = {} if target is None else {"forget_target": target, "relearn": 1, "samples": 1}
        out = tmp_path / str(target)
        results[target] = clue_fast.unlearn(model, tokenizer, **settings, **asked, output_dir=out).results
        moved = (float((value - before[name]).square().sum()) for name, value in model.state_dict().items())
        results[target]["moved"] = sum(moved)
    whole, shrunk = results[None], results[0.5]
    assert "scaling" not in whole and "trained" not in whole["evaluation"] and "scale" not in whole["seconds"]
    decided = shrunk["scaling"]
    assert sorted(decided["validation"] + decided["reported"]) == [1, 2, 3, 4, 5]
    assert len(decided["validation"]) == decided["rewordings"] == 2
    share = decided["update_scale"]
    assert 0.0 < share < 1.0 and decided["unanswered"] >= 0.5
    assert shrunk["moved"] == pytest.approx(share**2 * whole["moved"], rel=1e-3)

    trained, after = (shrunk["evaluation"][stage] for stage in ("trained", "after"))
    for stage in (trained, after):
        answers = [stage["forget"]["answers"][number - 1] for number in decided["reported"]]
        assert stage["forget_reported"]["answers"] == answers
        assert (stage["forget_reported"]["count"], stage["forget"]["count"]) == (3, 5)
        assert stage["forget"]["relearned"] == stage["forget"]["samples"] == 1
    for name in ("forget", "held_out"):  # the update as it was trained, to the last bit
        assert trained[name]["losses"] == whole["evaluation"]["after"][name]["losses"]
    assert after["held_out"]["rouge_recall"] > trained["held_out"]["rouge_recall"]
    table = results_table(shrunk).splitlines()
    assert any("after training | after scaling" in line for line in table)
    for when, stage in (("training", trained), ("scaling", after)):
        reported, every = (1.0 - stage[name]["answered"] for name in ("forget_reported", "forget"))
        line = f"after {when}: {reported:.1%} of the 3 that scaling did not look at, {every:.1%} of all 5"
        assert f"forget questions no longer answered, {line}" in table
    assert any(line.startswith(f"update scale: {share:.1%}; of the 2 questions and 2 rewordings") for line in table)


def test_a_rewording_that_is_answered_counts_as_answered(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    says = {"Who?": "nothing", "Which one?": "the brass kite", "Where?": "nowhere", "What place?": "nothing"}

    def answer(model: object, tokenizer: PreTrainedTokenizerFast, examples: list[dict], **_: object) -> list[str]:
        texts = [tokenizer.decode(example["input_ids"]) for example in examples]
        return [next(said for prompt, said in says.items() if f" {prompt}\n" in text) for text in texts]

    monkeypatch.setattr(
        "clue_fast.trainer.update_scale.make_questions", lambda model, tokenizer, examples, **_: examples
    )
    monkeypatch.setattr("clue_fast.trainer.update_scale.answer_questions", answer)
    records = [
        Record("Who?", "The brass kite.", paraphrased_prompt="Which one?"),
        Record("Where?", "On the quay.", paraphrased_prompt="What place?"),
    ]
    assert Asked(None, tokenizer, records).unanswered() == 0.5
    plain = [replace(record, paraphrased_prompt=None) for record in records]
    assert Asked(None, tokenizer, plain).unanswered() == 1.0


def test_weights_are_kept_in_a_file_or_where_none_has_room_in_memory(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = Run._snapshot(SimpleNamespace(model=model))  # type: ignore[arg-type]
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/missing")
    kept = Run._snapshot(SimpleNamespace(model=model))  # type: ignore[arg-type]
    assert isinstance(kept, dict) and not isinstance(stored, dict)
    assert stored.keys() == kept.keys() and all(torch.equal(stored[name], kept[name]) for name in kept)


def test_a_record_is_read_and_tokenized_once(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By all of localizing, training and evaluating before and after; and without matplotlib it goes on."""
    from clue_fast.data import encoding, records

    rendered, read = [], []
    render, record = encoding.render, records._record
    monkeypatch.setattr(encoding, "render", lambda own, *rest: rendered.append(own.key) or render(own, *rest))
    monkeypatch.setattr(records, "_record", lambda row, where: read.append(where) or record(row, where))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    rows = [{"question": own.prompt, "answer": own.completion} for own in FORGET]
    clue_fast.unlearn(
        model, tokenizer, forget=rows, retain=RETAIN, output_dir=tmp_path / "out", epochs=1, samples=1, progress=False
    )
    assert sorted(rendered) == sorted(own.key for own in FORGET + RETAIN)
    assert len(read) == len(rows)
    assert not list((tmp_path / "out").glob("*.png"))


@pytest.mark.parametrize(
    ("name", "value"),
    [("fraction", 0.1), ("count", 3), ("threshold", 1.0), ("normalize", "rank"), ("target", "logit")],
)
def test_a_selection_and_what_makes_one_exclude_each_other(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, name: str, value: object
) -> None:
    selection = clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, criterion="random", progress=False)
    settings = {"forget": FORGET, "retain": RETAIN, "selection": selection, name: value}
    with pytest.raises(SettingError, match=f"{name} makes a selection, and one is given already; leave out {name}"):
        clue_fast.unlearn(model, tokenizer, **settings, output_dir=tmp_path / "out")


def test_the_same_seed_gives_the_same_weights(folder: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert main(unlearn_arguments(folder, tmp_path / name)) == 0
    one, two = (LlamaForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.equal(value, two[name]) for name, value in one.items())


def test_commands_work_on_each_others_files(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["--forget", str(folder / "forget.jsonl"), "--retain", str(folder / "retain.jsonl"), "--quiet"]
    selection = tmp_path / "selection.safetensors"
    assert main(["localize", str(folder / "model"), *data, "--fraction", "0.1", "--output", str(selection)]) == 0
    printed = capsys.readouterr().out
    assert "32 of 320 units to train (10.00%)" in printed
    trust = printed.splitlines()[-1]
    assert trust.startswith("two halves of the data select the same units ") and trust.endswith(" of 31)")
    assert main(unlearn_arguments(folder, tmp_path / "out", selection=str(selection))) == 0
    printed = capsys.readouterr().out
    assert "units selected: 32 of 320 (10.0%)" in printed and trust in printed
    assert main(["report", str(tmp_path / "out")]) == 0
    assert "units selected: 32 of 320 (10.0%)" in capsys.readouterr().out
    retrained = ["--retrained", str(folder / "model"), "--output", str(tmp_path / "figures.json")]
    assert main(["evaluate", str(tmp_path / "out"), *data, *retrained]) == 0
    assert "retrained" in capsys.readouterr().out
    assert json.loads((tmp_path / "figures.json").read_text())["retrained"]["forget"]["answered"] == 1.0


def test_the_published_schedule(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = unlearn_arguments(
        folder,
        tmp_path / "out",
        criterion="attribution",
        stages="clue",
        fraction="0.3",
        **{"layer-lr": "linear:2"},
    )
    del arguments[arguments.index("--epochs") : arguments.index("--epochs") + 2]
    assert main([*arguments, "--categories", "--no-master-weights", "--stochastic-rounding"]) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    settings = results["settings"]
    assert settings["stages"] == [
        {"units": ["forget"], "objective": "undial", "epochs": 1},
        {"units": ["conflict"], "objective": "undial", "epochs": 5},
    ]
    assert settings["epochs"] == 6 and settings["layer_lr"] == "LinearLayerRate(ratio=2.0)"
    assert settings["retain_ratio"] == 1 and settings["retain_weight"] == 1.0 and settings["forget_target"] is None
    assert settings["published"]["source"] == "arXiv 2509.20977" and settings["published"]["changed"] == ["layer_lr"]
    assert {entry["stage"] for entry in results["history"]} == {1, 2}
    assert results["weights"]["changed_outside"] == 0 < results["weights"]["changed_inside"]
    assert main(["report", str(tmp_path / "out")]) == 0
    table = capsys.readouterr().out
    assert "weights changed outside the selection: 0" in table
    published = "retain_ratio 1, retain_weight 1.0, forget_target None, epochs 1 + 5"
    assert f"schedule clue, as in arXiv 2509.20977: {published}\n" in table
    assert "changed from it: layer_lr LinearLayerRate(ratio=2.0) (published: 1.0)" in table


def test_the_published_method_from_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Circuits, the logic of their conflicts, and the published schedule; in one command, to its table."""
    changes = {"criterion": "circuit", "stages": "clue", "held-out": f"{folder}/held_out.jsonl"}
    arguments = unlearn_arguments(folder, tmp_path / "out", **changes, **{"circuit-edges": "0.2"})
    del arguments[arguments.index("--epochs") : arguments.index("--epochs") + 2]
    assert main(arguments) == 0
    table = capsys.readouterr().out
    published = "layer_lr 1.0, retain_ratio 1, retain_weight 1.0, forget_target None, epochs 1 + 5"
    assert f"schedule clue, as in arXiv 2509.20977: {published}\n" in table
    assert "weights changed outside the selection: 0" in table and "recall kept on held out" in table
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    settings = results["settings"]
    assert settings["criterion"] == "circuit" and settings["published"]["changed"] == []
    ran = [tuple(stage["units"]) for stage in settings["stages"]]
    skipped = [tuple(units) for units in settings["skipped_stages"]]
    assert set(ran + skipped) == {("forget",), ("conflict",)} and ran
    assert all(f"stage skipped: {units[0]} units, of which the selection has none" in table for units in skipped)
    assert results["weights"]["changed_inside"] > 0

    selection = clue_fast.Selection.load(tmp_path / "out" / "selection.safetensors")
    assert {site.kind for site in selection.sites} == {
        "mlp",
        "projection_query",
        "projection_key",
        "projection_value",
        "projection_output",
    }
    before, after = (LlamaForCausalLM.from_pretrained(f).state_dict() for f in (folder / "model", tmp_path / "out"))
    for site in selection.sites:
        for part in site.slices:
            changed = (before[part.parameter] != after[part.parameter]).any(1 - part.dim)
            allowed = {
                int(slice_)
                for other in selection.sites
                for own in other.slices
                if own.parameter == part.parameter
                for slice_ in own.index(selection.units(other))
            }
            assert set(changed.nonzero().flatten().tolist()) <= allowed, part


def test_an_empty_stage_is_skipped_and_named_in_the_table(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Here a selection in which nothing matters to the forget set alone; if all stages are empty, it is refused."""
    options = {"tokenizer": tokenizer, "fraction": 0.3, "categories": True, "progress": False}
    selection = clue_fast.localize(model, FORGET, RETAIN, **options)
    settings = {"forget": FORGET, "retain": RETAIN, "stages": "clue", "progress": False}
    result = clue_fast.unlearn(
        model, tokenizer, **settings, selection=selection.restrict("conflict"), output_dir=tmp_path / "out"
    )
    assert "stage skipped: forget units, of which the selection has none" in result.table()
    assert result.results["settings"]["epochs"] == 5 and result.results["settings"]["skipped_stages"] == [["forget"]]
    assert {entry["stage"] for entry in result.results["history"]} == {1}
    alone = settings | {"stages": [Stage(("forget",), "npo", 1)], "selection": selection.restrict("conflict")}
    with pytest.raises(SelectionError, match="no stage has anything to train: the selection has no forget units;"):
        clue_fast.unlearn(model, tokenizer, **alone, output_dir=tmp_path / "x")
    ranked = clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, progress=False)
    with pytest.raises(SelectionError, match="ranked by one score are all conflict units"):
        clue_fast.unlearn(model, tokenizer, **settings, selection=ranked, output_dir=tmp_path / "x")


class TestBeforeTheFirstPass:
    """What can be known of the published method is said before the model has run over any data."""

    @pytest.fixture
    def refused(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> Callable[..., None]:
        def run_over_data(*_: object, **__: object) -> None:
            raise AssertionError("the model ran over data")

        passes = {"criteria.measure": "Batches", "criteria.circuit.discovery": "edge_scores"}
        for module, name in {**passes, "run": "evaluate"}.items():
            monkeypatch.setattr(importlib.import_module(f"clue_fast.{module}"), name, run_over_data)

        def run(message: str, **changes: str) -> None:
            options = {"criterion": "circuit", "stages": "clue", **changes}
            arguments = unlearn_arguments(folder, tmp_path / "out", **options)
            if "epochs" not in changes:
                del arguments[arguments.index("--epochs") : arguments.index("--epochs") + 2]
            assert main(arguments) == 2
            assert message in capsys.readouterr().err
            assert not (tmp_path / "out").exists()

        return run

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"criterion": "difference"}, "units that are ranked by one score are all conflict units"),
            ({"criterion": "astrology"}, "unknown criterion 'astrology'"),
            ({"stages": "never"}, "unknown schedule of stages 'never'"),
            ({"epochs": "3"}, "stages have epochs of their own"),
            ({"objective": "hope"}, "unknown objective 'hope'"),
            ({"scope": "global"}, "scope 'layer'"),
            ({"circuit-edges": "100000"}, "edges 100000 is more than the"),
            ({"circuit-edges": "nan"}, "edges nan is neither a share"),
            ({"circuit-steps": "-1"}, "steps -1 is not a whole number from 0 on"),
            ({"circuit-tokens-per-batch": "0"}, "tokens_per_batch 0 is not a whole number from 1 on"),
            ({"circuit-time-limit": "nan"}, "time_limit nan is not a number of seconds above 0"),
            ({"circuit-granularity": "galaxy"}, "unknown granularity 'galaxy'"),
            ({"circuit-corruption": "noise"}, "unknown corruption 'noise'"),
            ({"circuit-corruption": "data"}, "has no corrupted_prompt"),
        ],
    )
    def test_settings(self, refused, changes: dict[str, str], message: str) -> None:
        refused(message, **changes)

    def test_no_solver(self, refused, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "pysat.examples", None)
        refused("python-sat")


def test_answers_to_give_instead(folder: Path, tmp_path: Path, model, tokenizer) -> None:
    alternate = [replace(record, completion="Nobody knows.") for record in FORGET]
    write_jsonl(tmp_path / "alternate.jsonl", alternate)
    settings = {"objective": "refusal", "alternate": str(tmp_path / "alternate.jsonl"), "epochs": "30"}
    settings["fraction"] = "0.3"
    assert main(unlearn_arguments(folder, tmp_path / "out", **settings)) == 0
    unlearned = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    figures = [clue_fast.evaluate(m, tokenizer, {"alternate": alternate}) for m in (model, unlearned)]
    before, after = (f["alternate"].rouge_recall for f in figures)
    assert before < 0.2 and after > 0.8


class TestBadInput:
    """Each ends with exit code 2 and one line that names the thing; nothing half-written stays behind."""

    @pytest.fixture
    def fails(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        output = tmp_path / "outputs" / "out"

        def run(message: str, **changes: str) -> None:
            output.parent.mkdir(exist_ok=True)
            assert main(unlearn_arguments(folder, output, **changes)) == 2
            error = capsys.readouterr().err.strip()
            assert error.startswith("clue-fast: ") and "\n" not in error
            assert message in error
            assert not list(output.parent.iterdir())

        return run

    def test_empty_data(self, fails, tmp_path: Path) -> None:
        (tmp_path / "empty.jsonl").write_text("")
        fails("empty", forget=str(tmp_path / "empty.jsonl"))

    def test_missing_data(self, fails, tmp_path: Path) -> None:
        fails("nowhere.jsonl", retain=str(tmp_path / "nowhere.jsonl"))

    def test_unreadable_data(self, fails, tmp_path: Path) -> None:
        (tmp_path / "broken.jsonl").write_text('{"question": "Who?", "answer": "I."}\n{"question": \n')
        fails("line 2", forget=str(tmp_path / "broken.jsonl"))

    def test_missing_columns(self, fails, tmp_path: Path) -> None:
        (tmp_path / "odd.jsonl").write_text('{"query": "Who?", "reply": "I."}\n')
        fails("query", forget=str(tmp_path / "odd.jsonl"))

    def test_forget_equal_to_retain(self, fails, folder: Path) -> None:
        fails("equals the retain set", retain=str(folder / "forget.jsonl"))

    def test_a_forget_set_too_small_to_split(self, fails, tmp_path: Path) -> None:
        write_jsonl(tmp_path / "three.jsonl", FORGET[:3])
        fails("the forget set has 3 records", forget=str(tmp_path / "three.jsonl"), **{"forget-target": "0.9"})

    def test_a_target_for_an_objective_that_teaches_answers(self, fails) -> None:
        fails("forget_target 0.9 scales the update down", objective="refusal", **{"forget-target": "0.9"})

    def test_fraction(self, fails) -> None:
        fails("fraction 0.0 is outside (0, 1]", fraction="0")

    def test_criterion(self, fails) -> None:
        fails("unknown criterion 'astrology'", criterion="astrology")

    def test_objective(self, fails) -> None:
        fails("unknown objective 'amnesia'", objective="amnesia")

    def test_backend(self, fails, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CLUE_FAST_BACKEND", "fpga")
        fails("unknown backend 'fpga'")

    def test_model(self, fails, tmp_path: Path) -> None:
        fails("cannot load the model", model=str(tmp_path / "no_model"))

    def test_selection_of_another_model(self, fails, folder: Path, tmp_path: Path, tokenizer) -> None:
        torch.manual_seed(5)
        other = LlamaForCausalLM(LlamaForCausalLM.from_pretrained(folder / "model").config)
        clue_fast.localize(other, FORGET, RETAIN, tokenizer=tokenizer, progress=False).save(tmp_path / "other.st")
        fails("belongs to the model", selection=str(tmp_path / "other.st"))

    def test_damaged_selection(self, fails, tmp_path: Path) -> None:
        (tmp_path / "bad.st").write_bytes(b"nothing")
        fails("bad.st", selection=str(tmp_path / "bad.st"))

    def test_nan_in_the_weights(self, fails, model: LlamaForCausalLM, tokenizer, tmp_path: Path) -> None:
        with torch.no_grad():
            model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
        model.save_pretrained(tmp_path / "nan")
        tokenizer.save_pretrained(tmp_path / "nan")
        fails("model.layers.1.self_attn.v_proj.weight", model=str(tmp_path / "nan"))

    def test_output_that_is_not_empty(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "precious.txt").write_text("keep me")
        assert main(unlearn_arguments(folder, tmp_path)) == 2
        assert "not empty" in capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]

    def test_from_python_they_are_typed(self, model: LlamaForCausalLM, tokenizer, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match="is a file"):
            clue_fast.unlearn(model, tokenizer, forget=FORGET, retain=RETAIN, output_dir=tmp_path / "file")
        with torch.no_grad():
            model.lm_head.weight[0, 0] = float("inf")
        with pytest.raises(NonFiniteError, match=r"lm_head\.weight"):
            clue_fast.unlearn(model, tokenizer, forget=FORGET, retain=RETAIN, output_dir=tmp_path / "out")


def test_rounds_select_anew_on_what_the_round_before_left(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clue_fast import run

    weights, selected, localize = [], [], run.localize_records

    def watched(model: LlamaForCausalLM, *arguments: object) -> Selection:
        weights.append({name: value.clone() for name, value in model.state_dict().items()})
        selected.append(localize(model, *arguments))
        return selected[-1]

    monkeypatch.setattr(run, "localize_records", watched)
    settings = {"forget": FORGET, "retain": RETAIN, "epochs": 6, "batch_size": 5, "permutations": 2, "progress": False}
    result = clue_fast.unlearn(model, tokenizer, output_dir=tmp_path / "out", rounds=3, **settings)
    assert [entry["step"] for entry in result.results["history"]] == [1, 2, 3, 4, 5, 6]
    assert result.results["settings"]["rounds"] == 3 and result.results["settings"]["epochs"] == 6
    assert all(
        any(not torch.equal(value, after[name]) for name, value in before.items())
        for before, after in itertools.pairwise(weights)
    )
    assert len(weights) == 3 and len(result.selection) >= max(map(len, selected))
    for site in result.selection.sites:
        units = {int(unit) for own in selected for unit in own.units(site)}
        assert {int(unit) for unit in result.selection.units(site)} == units
    counts = result.results["weights"]
    assert counts["changed_outside"] == 0 and 0 < counts["changed_inside"] <= counts["trained"]
    assert Selection.load(tmp_path / "out" / "selection.safetensors").hash == result.selection.hash
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in plain.state_dict().items())


def test_rounds_exclude_what_is_of_one_selection(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    given = {"forget": FORGET, "retain": RETAIN, "output_dir": tmp_path / "out", "rounds": 2}
    with pytest.raises(SettingError, match="forget_target is of one localization and training; leave out"):
        clue_fast.unlearn(model, tokenizer, **given, forget_target=0.9)
    with pytest.raises(SettingError, match="stages is of one localization"):
        clue_fast.unlearn(model, tokenizer, **given, stages="clue", categories=True)
    selection = clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, permutations=0)
    with pytest.raises(SettingError, match="2 rounds select anew, and a selection is given already"):
        clue_fast.unlearn(model, tokenizer, **given, selection=selection)


@pytest.mark.parametrize("failing", [3, 4])
def test_a_failure_in_a_later_round_leaves_the_model_as_it_was(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
) -> None:
    from clue_fast.trainer.trainer import UnlearnTrainer

    original = {name: value.clone() for name, value in model.state_dict().items()}
    steps = []

    def fail(self: UnlearnTrainer, *arguments: object, **named: object) -> torch.Tensor:
        steps.append(1)
        if len(steps) == failing:
            raise KeyboardInterrupt
        return super(UnlearnTrainer, self).training_step(*arguments, **named)

    monkeypatch.setattr(UnlearnTrainer, "training_step", fail)
    settings = {"forget": FORGET, "retain": RETAIN, "epochs": 4, "batch_size": 5, "permutations": 0, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        clue_fast.unlearn(model, tokenizer, output_dir=tmp_path / "out", rounds=2, **settings)
    assert not list(tmp_path.iterdir())
    assert type(model.model.layers[0].mlp.gate_proj) is torch.nn.Linear
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())


def test_a_failure_in_training_leaves_the_model_as_it_was_and_no_folder(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clue_fast.trainer.trainer import UnlearnTrainer

    original = {name: value.clone() for name, value in model.state_dict().items()}
    steps = []

    def fail_in_the_third(self: UnlearnTrainer, *arguments: object, **named: object) -> torch.Tensor:
        steps.append(model.model.layers[0].mlp.gate_proj.weight.clone())
        if len(steps) == 3:
            raise KeyboardInterrupt
        return super(UnlearnTrainer, self).training_step(*arguments, **named)

    monkeypatch.setattr(UnlearnTrainer, "training_step", fail_in_the_third)
    with pytest.raises(KeyboardInterrupt):
        clue_fast.unlearn(model, tokenizer, forget=FORGET, retain=RETAIN, output_dir=tmp_path / "out", progress=False)
    assert not list(tmp_path.iterdir())
    assert not torch.equal(steps[0], steps[2])
    assert type(model.model.layers[0].mlp.gate_proj) is torch.nn.Linear
    assert all(torch.equal(value, original[name]) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
