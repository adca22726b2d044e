"""The command line: bad input of every command is one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import BitNetConfig, BitNetForCausalLM, LlamaConfig, LlamaForCausalLM

import clue_fast
from clue_fast import cli
from clue_fast.config import CircuitConfig, EvalConfig, LocalizeConfig, UnlearnConfig
from clue_fast.config.schema import Settings
from clue_fast.criteria import CRITERIA, TARGETS
from clue_fast.demo import write_jsonl
from clue_fast.demo.people import make_people, records_of
from clue_fast.demo.pretraining import train_tokenizer
from clue_fast.errors import BudgetError, SettingError
from clue_fast.evaluation import evaluate_model
from clue_fast.objectives import OBJECTIVES
from clue_fast.selection import SCOPES

PEOPLE = make_people(4, seed=3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model, and forget and retain sets."""
    folder = tmp_path_factory.mktemp("inputs")
    sets = {"forget": records_of(PEOPLE[:1]), "retain": records_of(PEOPLE[1:])}
    tokenizer = train_tokenizer(sets["forget"] + sets["retain"], vocab_size=400)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, records in sets.items():
        write_jsonl(folder / f"{name}.jsonl", records)
    return folder


@pytest.fixture
def refuses(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """refuses(message, command, *arguments): the command ends with code 2, one line and no file."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(message: str, command: str, *arguments: str, data: bool = True) -> None:
        before = sorted(work.rglob("*"))
        sets = ["--forget", f"{inputs}/forget.jsonl", "--retain", f"{inputs}/retain.jsonl"] if data else []
        model = [f"{inputs}/model"] if data else []
        capsys.readouterr()
        assert cli.main([command, *model, *sets, *arguments, "--quiet"]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("clue-fast: ") and "\n" not in error
        assert message in error
        assert sorted(work.rglob("*")) == before

    return run


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("--fraction", "1.5", "fraction 1.5 is outside (0, 1]"),
        ("--fraction", "nan", "fraction nan is outside (0, 1]"),
        ("--scope", "galaxy", "unknown scope 'galaxy'"),
        ("--permutations", "-1", "permutations -1 is not a whole number from 0 (none) on"),
        ("--learning-rate", "0", "learning_rate 0.0 is not a number above 0"),
        ("--learning-rate", "nan", "learning_rate nan is not a number above 0"),
        ("--layer-lr", "-1", "layer_lr -1.0 is not a number above 0"),
        ("--layer-lr", "linear:-1", "layer_lr 'linear:-1' is neither a number nor linear:NUMBER"),
        ("--retain-ratio", "0", "retain_ratio 0 is not a positive integer"),
        ("--forget-target", "1.5", "forget_target 1.5 is not a share above 0 and up to 1"),
        ("--forget-target", "nan", "forget_target nan is not a share above 0 and up to 1"),
        ("--layer-lr", "slow", "layer_lr 'slow' is neither a number nor linear:NUMBER"),
        ("--master", "fp16", "unknown master 'fp16'; choose one of: fp32, stochastic"),
        ("--stochastic-rounding", "", "master_weights and stochastic_rounding exclude each other"),
        ("--count", "2", "give one budget, not fraction and count"),
        ("--device", "tpu:9", "device 'tpu:9' cannot be used"),
        ("--dtype", "int8", "unknown dtype 'int8'; choose one of: auto, bfloat16, float16, float32"),
        ("--target", "astrology", "unknown target 'astrology'"),
        ("--layers", "1:0.5", "layers (1.0, 0.5) is no part of the depth; give two shares, such as (0.5, 1.0)"),
        ("--kinds", "astrology", "unknown kind of site 'astrology'"),
        ("--stages", "clue", "a stage trains forget units, and units that are ranked by one score are all conflict"),
        ("--stages", "never", "unknown schedule of stages 'never'"),
        ("--circuit-steps", "1", "settings of circuits need the criterion 'circuit'"),
        ("--alternate", "nowhere.jsonl", "nowhere.jsonl"),
        ("--epochs", "0", "epochs 0.0 is not a number above 0"),
        ("--batch-size", "0", "batch_size 0 is not a positive integer"),
    ],
)
def test_settings(refuses, setting: str, value: str, message: str) -> None:
    other = ["--fraction", "0.1"] if setting == "--count" else []
    refuses(message, "unlearn", "--output", "a/b/out", *other, setting, *([value] if value else []))


KINDS = {
    "localize": (clue_fast.localize, LocalizeConfig),
    "unlearn": (clue_fast.unlearn, UnlearnConfig),
    "evaluate": (evaluate_model, EvalConfig),
}


@pytest.mark.parametrize("command", KINDS)
def test_every_setting_is_an_argument_and_a_flag_with_one_default(command: str) -> None:
    function, kind = KINDS[command]
    parameters = inspect.signature(function).parameters
    flags = {action.dest: action for action in subparser(command)._actions}
    for one in dataclasses.fields(kind):
        assert parameters[one.name].default == getattr(kind(), one.name), one.name
        if one.name not in ("circuit", "progress"):
            assert flags[one.name].default is argparse.SUPPRESS
    assert kind is EvalConfig or {f"circuit.{one.name}" for one in dataclasses.fields(CircuitConfig)} <= flags.keys()
    assert kind() == Settings({}).make(kind)


def subparser(command: str) -> argparse.ArgumentParser:
    (commands,) = (a for a in cli._parser([command])._actions if isinstance(a, argparse._SubParsersAction))
    return commands.choices[command]


def parsed(command: str, *flags: str) -> Settings:
    _, kind = KINDS[command]
    arguments = [command, "MODEL", "--forget", "F", "--retain", "R", "--output", "O", *flags]
    return cli._settings(cli._parser(arguments).parse_args(arguments), kind)


def test_flags_make_the_settings(caplog: pytest.LogCaptureFixture) -> None:
    assert parsed("unlearn", "--circuit-edges", "0.2", "--criterion", "circuit").make(UnlearnConfig) == UnlearnConfig(
        criterion="circuit", circuit=CircuitConfig(edges=0.2)
    )
    config = parsed("unlearn", "--fraction", "mlp=0.1,attention=0.2", "--kinds", "mlp, attention").make(UnlearnConfig)
    assert config.fraction == {"mlp": 0.1, "attention": 0.2} and config.kinds == ("mlp", "attention")
    assert parsed("unlearn", "--layers", "0.667:1").make(UnlearnConfig).layers == (0.667, 1.0)
    assert parsed("unlearn", "--forget-target", "none", "--no-strict").make(UnlearnConfig) == UnlearnConfig()
    old = parsed("unlearn", "--master", "stochastic").make(UnlearnConfig)
    assert (old.master_weights, old.stochastic_rounding) == (False, True)


def test_an_old_flag_works_and_says_the_new_one(
    inputs: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    sets = ["--forget", f"{inputs}/forget.jsonl", "--retain", f"{inputs}/retain.jsonl", "--quiet"]
    assert cli.main(["evaluate", f"{inputs}/model", *sets, "--reference", f"{inputs}/model"]) == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["set", "metric", "model", "retrained"]
    assert [r.message for r in caplog.records if r.name == "clue_fast.cli"] == [
        f"--reference {inputs}/model is --retrained {inputs}/model now; the old flag goes with the next release"
    ]


def test_help_lists_choices_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["unlearn", "--help"])
    help = " ".join(capsys.readouterr().out.split())
    for choices in (CRITERIA, OBJECTIVES, SCOPES, TARGETS):
        assert ", ".join(choices) in help
    assert "(default: 512)" in help and "(default: 0)" in help


def test_the_first_help_loads_no_torch() -> None:
    script = "import sys; from clue_fast import cli\ntry: cli.main(['--help'])\nexcept SystemExit: pass\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}print('torch' in sys.modules)"], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "False"


class TestConfigurationFile:
    """Flags go before the file; a mistake is named with its key, its line and the choices."""

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("run.yaml", "criterion: circuit\nlearning_rate: 1e-3\ncircuit:\n  edges: 0.2\nseed:\nkinds: [mlp]\n"),
            (
                "run.json",
                '{\n\t"criterion": "circuit", "learning-rate": 1e-3, "circuit": {"edges": 0.2}, "kinds": "mlp"}',
            ),
        ],
    )
    def test_of_both_formats(self, tmp_path: Path, name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        made = UnlearnConfig.load(tmp_path / name)
        circuit = CircuitConfig(edges=0.2)
        assert made == UnlearnConfig(criterion="circuit", learning_rate=1e-3, circuit=circuit, kinds=("mlp",))
        flags = parsed("unlearn", "--config", str(tmp_path / name), "--learning-rate", "0.5")
        assert flags.make(UnlearnConfig) == dataclasses.replace(made, learning_rate=0.5)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "seed: 1\nfractoin: 0.1\n",
                "line 2: unknown setting 'fractoin'; choose one of: alternate, attacks, backend,",
            ),
            ("seed: 1\n\nfraction: 1.5\n", "line 3: fraction 1.5 is outside (0, 1]"),
            ("scope: galaxy\n", "line 1: unknown scope 'galaxy'; choose one of: layer, kind, global"),
            ("fraction: 0.1\nseed: 0\ncount: 3\n", "line 1 and 3: give one budget, not fraction and count"),
            ("circuit:\n  edges: 0.1\n  logic: fuzzy\ncriterion: circuit\n", "line 3: unknown logic 'fuzzy'"),
            (
                "seed: 1\ncriterion: circuits\n",
                "line 2: unknown criterion 'circuits'; choose one of: attribution, circuit",
            ),
            ("circuit:\n  edges: 0.1\n", "line 2: settings of circuits need the criterion 'circuit'"),
            ("circuit:\n  edgse: 0.1\n", "line 2: unknown setting 'circuit.edgse'"),
            ("epochs: 3\nstages: clue\n", "line 1 and 2: stages have epochs of their own"),
            ("master_weights: true\nstochastic_rounding: true\n", "line 1 and 2: master_weights and stochastic"),
            ("seed: 1\nbatch_size: many\n", "line 2: batch_size 'many' should be a number"),
            ("batch_size: 2.5\n", "line 1: batch_size 2.5 is not a positive integer"),
            ("strict: 3\n", "line 1: strict 3 should be true or false"),
            ("permutations: true\n", "line 1: permutations True should be a value, not a switch"),
            ("criterion: [a, b]\n", "line 1: criterion ['a', 'b'] should be a name"),
            ("fraction: {mlp: much}\n", "line 1: fraction 'much' is not a number"),
            ("layer_lr: slow\n", "line 1: layer_lr 'slow' is neither a number nor linear:NUMBER"),
            ("seed: 1\nseed: 2\n", "line 2: seed stands there twice"),
            ("seed: [1\n", "not valid YAML"),
            ("- seed\n", "line 1: expected the names of settings"),
        ],
    )
    def test_a_mistake(self, refuses, tmp_path: Path, text: str, message: str) -> None:
        (tmp_path / "run.yaml").write_text(text)
        refuses(
            f"run.yaml, {message}" if message.startswith("line") else message,
            "unlearn",
            "--output",
            "out",
            "--config",
            f"{tmp_path}/run.yaml",
        )

    def test_from_python_it_is_typed(self, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text("scope: galaxy\n")
        with pytest.raises(BudgetError, match=r"run\.yaml, line 1: unknown scope"):
            LocalizeConfig.load(tmp_path / "run.yaml")
        (tmp_path / "run.json").write_text("{")
        with pytest.raises(SettingError, match=r"run\.json, line 1: not valid JSON"):
            LocalizeConfig.load(tmp_path / "run.json")

    def test_that_is_not_there(self, refuses) -> None:
        refuses(
            "the configuration nowhere.yaml cannot be read", "localize", "--config", "nowhere.yaml", "--output", "o"
        )

    def test_paths_stand_in_it_too(self, inputs: Path, tmp_path: Path) -> None:
        lines = [f"forget: {inputs}/forget.jsonl", f"retain: {inputs}/retain.jsonl", f"output: {tmp_path}/selection"]
        (tmp_path / "run.yaml").write_text("\n".join([*lines, "permutations: 0", "count: 3", "dtype: float32"]))
        assert cli.main(["localize", f"{inputs}/model", "--config", f"{tmp_path}/run.yaml", "--quiet"]) == 0
        assert len(clue_fast.Selection.load(tmp_path / "selection")) == 6


@pytest.mark.parametrize("command", ["unlearn", "evaluate"])
def test_held_out_records_that_are_not(refuses, command: str, inputs: Path, tmp_path: Path) -> None:
    for name in ("forget", "retain"):
        held_out = ["--held-out", str(inputs / f"{name}.jsonl"), "--output", "out"]
        refuses(f"the {name} set equals the held_out set", command, *held_out)
    rows = [line for name in ("retain", "forget") for line in (inputs / f"{name}.jsonl").read_text().splitlines()[:2]]
    (tmp_path / "some.jsonl").write_text("\n".join(rows))
    held_out = ["--held-out", str(tmp_path / "some.jsonl"), "--output", "out"]
    refuses("2 of the 5 forget records are in the held_out set too", command, *held_out)


@pytest.mark.parametrize("command", ["localize", "unlearn"])
def test_strict_stops_at_a_layer_that_cannot_be_fused(refuses, command: str, inputs: Path, tmp_path: Path) -> None:
    """A norm inside its MLP: recorded all the same, unless that is not wanted."""
    config = BitNetConfig(**json.loads((inputs / "model" / "config.json").read_text()) | {"model_type": "bitnet"})
    config.architectures = config.dtype = None
    BitNetForCausalLM(config).save_pretrained(tmp_path / "model")
    for file in (inputs / "model").glob("*token*"):
        shutil.copy(file, tmp_path / "model")
    sets = ["--forget", f"{inputs}/forget.jsonl", "--retain", f"{inputs}/retain.jsonl"]
    arguments = [command, str(tmp_path / "model"), *sets, "--output", "out", "--permutations", "0"]
    refuses("model.layers.0.mlp (BitNetMLP) does not compute down(act(gate) · up)", *arguments, "--strict", data=False)
    if command == "localize":
        assert cli.main([*arguments, "--quiet"]) == 0
        assert Path("out").exists()


@pytest.mark.parametrize("command", ["localize", "unlearn", "evaluate"])
class TestData:
    def test_empty(self, refuses, command: str, tmp_path: Path) -> None:
        (tmp_path / "empty.jsonl").touch()
        refuses("empty.jsonl) is empty", command, "--output", "out", "--forget", str(tmp_path / "empty.jsonl"))

    def test_broken(self, refuses, command: str, tmp_path: Path) -> None:
        (tmp_path / "broken.jsonl").write_text('{"text": "fine"}\nnot fine\n')
        refuses("broken.jsonl, line 2", command, "--output", "out", "--retain", str(tmp_path / "broken.jsonl"))

    def test_columns(self, refuses, command: str, tmp_path: Path) -> None:
        (tmp_path / "odd.jsonl").write_text('{"text": "fine"}\n{"tekst": "not fine"}\n')
        refuses("line 2: found the columns 'tekst'", command, "--output", "out", "--retain", f"{tmp_path}/odd.jsonl")

    def test_the_same_twice(self, refuses, command: str, inputs: Path) -> None:
        refuses("equals the retain set", command, "--output", "out", "--retain", str(inputs / "forget.jsonl"))

    def test_data_is_looked_at_before_the_model(self, refuses, command: str, tmp_path: Path) -> None:
        missing = str(tmp_path / "none.jsonl")
        arguments = [str(tmp_path / "no_model"), "--forget", missing, "--retain", missing, "--output", "out"]
        refuses("none.jsonl does not exist", command, *arguments, data=False)


class TestOutput:
    @pytest.mark.parametrize("command", ["localize", "evaluate"])
    def test_of_a_file(self, refuses, command: str) -> None:
        Path("folder").mkdir()
        refuses("folder: it is a folder; name a file", command, "--output", "folder")
        refuses("choose a folder that exists", command, "--output", "nowhere/file")

    def test_of_a_folder(self, refuses) -> None:
        Path("folder").mkdir()
        Path("folder/precious.txt").write_text("keep me")
        refuses("folder is not empty; name a new one", "unlearn", "--output", "folder")
        refuses("precious.txt is a file", "unlearn", "--output", "folder/precious.txt")
        refuses("folder is not empty", "demo", "--output", "folder", data=False)
        assert Path("folder/precious.txt").read_text() == "keep me"

    def test_of_a_report(self, refuses) -> None:
        refuses("nowhere holds no results.json", "report", "nowhere", data=False)


@pytest.mark.parametrize("command", ["localize", "unlearn"])
def test_unknown_names(refuses, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses("unknown criterion 'astrology'; choose one of:", command, "--output", "out", "--criterion", "astrology")
    monkeypatch.setenv("CLUE_FAST_BACKEND", "fpga")
    refuses("unknown backend 'fpga'; choose one of:", command, "--output", "out")


@pytest.mark.parametrize("command", ["localize", "unlearn", "evaluate"])
def test_a_folder_that_holds_no_model(refuses, command: str, inputs: Path) -> None:
    sets = ["--forget", f"{inputs}/forget.jsonl", "--retain", f"{inputs}/retain.jsonl", "--output", "out"]
    refuses(f"cannot load the model {inputs}", command, str(inputs), *sets, data=False)


def test_an_evaluation_is_written_whole(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--forget", f"{inputs}/forget.jsonl", "--retain", f"{inputs}/retain.jsonl"]
    assert cli.main(["evaluate", f"{inputs}/model", *sets, "--output", f"{tmp_path}/figures.json", "--quiet"]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["model"]["forget"]["count"] == 5 == len(figures["model"]["forget"]["answers"])
    assert "questions answered" in capsys.readouterr().out
    report = (tmp_path / "figures.html").read_text()
    assert all(record.prompt in report and record.completion in report for one in PEOPLE for record in one.records)


def test_an_evaluation_attacks_every_model(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--forget", f"{inputs}/forget.jsonl", "--retain", f"{inputs}/retain.jsonl"]
    others = ["--before", f"{inputs}/model", "--retrained", f"{inputs}/model"]
    asked = ["--attacks", "prefix,relearning", "--output", f"{tmp_path}/figures.html", "--quiet"]
    assert cli.main(["evaluate", f"{inputs}/model", *sets, *others, *asked]) == 0
    figures = json.loads((tmp_path / "figures.html").read_text())
    assert list(figures) == ["before", "model", "retrained"]
    assert capsys.readouterr().out.splitlines()[0].split() == ["set", "metric", "before", "model", "retrained"]
    for own in figures.values():
        assert list(own["forget"]["attacks"]) == ["greedy", "relearning", "prefix"] and "attacks" not in own["retain"]
    assert "50% of the answer given" in (tmp_path / "figures.report.html").read_text()


def test_an_evaluation_in_depth(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--forget", f"{inputs}/forget.jsonl", "--retain", f"{inputs}/retain.jsonl"]
    assert cli.main(["evaluate", f"{inputs}/model", *sets, "--samples", "2", "--relearn", "1", "--quiet"]) == 0
    table = capsys.readouterr().out
    for title in ("answered, best of 2", "answered before relearning 1", "answered after relearning 1"):
        assert [line.split()[0] for line in table.splitlines() if title in line] == ["forget"]


def test_further_metrics_are_named_and_finished_sets_kept(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("The river rose slowly at first, and then it stood in the gardens.")
    (tmp_path / "unseen.jsonl").write_text(json.dumps({"question": "Who is Zoe?", "answer": "A smith."}) + "\n")
    sets = ["--forget", f"{inputs}/forget.jsonl", "--retain", f"{inputs}/retain.jsonl"]
    files = ["--text", f"{tmp_path}/text.txt", "--unseen", f"{tmp_path}/unseen.jsonl", "--cache", f"{tmp_path}/kept"]
    command = ["evaluate", f"{inputs}/model", *sets, *files, "--metrics", "all", "--quiet"]
    assert cli.main(command) == 0
    table = capsys.readouterr().out
    titles = ("extraction strength, generated", "membership by min-k++", "gibberish", "perplexity")
    assert all(title in table for title in titles)
    assert "skipped: model utility (retain): " in table
    assert len(list((tmp_path / "kept").iterdir())) == 3
    assert cli.main(command) == 0
    assert capsys.readouterr().out == table


def test_an_evaluation_out_of_range(refuses) -> None:
    refuses("unknown metric 'luck'; choose one of: accuracy, all,", "evaluate", "--metrics", "gibberish,luck")
    refuses("relearn 5 leaves none of the 5 records of the forget set", "evaluate", "--relearn", "5")
    refuses("samples -1 of the forget set", "evaluate", "--samples", "-1")
    refuses("unknown attack 'bribes'; choose one of: all, context,", "evaluate", "--attacks", "greedy,bribes")


def test_interrupted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("clue_fast.env.diagnosis", interrupt)
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "clue-fast: interrupted; nothing half-written was left\n"


@pytest.mark.parametrize("arguments", [[], ["localise"], ["unlearn", "model"], ["localize", "m", "--fraction", "few"]])
def test_what_cannot_be_parsed_has_exit_code_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: clue-fast" in capsys.readouterr().err


def test_the_installed_command(tmp_path: Path) -> None:
    """In a process of its own: nothing but the one line reaches stderr, with progress bars allowed."""
    missing = str(tmp_path / "none.jsonl")
    arguments = ["unlearn", "model", "--forget", missing, "--retain", missing, "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "clue_fast", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"clue-fast: the forget set {missing} does not exist; check the path\n"
    assert not list(tmp_path.iterdir())
