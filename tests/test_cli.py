"""The command line: bad input of every command is one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

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
from clue_fast import cli, workflow
from clue_fast.criteria.circuit import CircuitSettings
from clue_fast.demo import write_jsonl
from clue_fast.demo.people import make_people, records_of
from clue_fast.demo.pretraining import train_tokenizer

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
        ("--layer-lr", "linear:-1", "layer-lr 'linear:-1' is neither a number nor linear:NUMBER"),
        ("--retain-ratio", "0", "retain_ratio 0 is not a whole number above 0"),
        ("--forget-target", "1.5", "forget_target 1.5 is not a share above 0 and up to 1"),
        ("--forget-target", "nan", "forget_target nan is not a share above 0 and up to 1"),
        ("--layer-lr", "slow", "layer-lr 'slow' is neither a number nor linear:NUMBER"),
        ("--master", "fp16", "unknown master 'fp16'; choose one of: fp32, stochastic"),
        ("--stages", "clue", "a stage trains forget units, and units that are ranked by one score are all conflict"),
        ("--stages", "never", "unknown schedule of stages 'never'"),
        ("--circuit-steps", "1", "settings of circuits need the criterion 'circuit'"),
        ("--alternate", "nowhere.jsonl", "nowhere.jsonl"),
        ("--epochs", "0", "epochs 0.0 is not a number above 0"),
        ("--batch-size", "0", "batch_size 0 is not a whole number above 0"),
    ],
)
def test_settings(refuses, setting: str, value: str, message: str) -> None:
    refuses(message, "unlearn", "--output", "a/b/out", setting, value)


def test_the_command_has_the_defaults_of_the_functions() -> None:
    arguments = ["MODEL", "--forget", "F", "--retain", "R", "--output", "O"]
    options = cli._parser().parse_args(["unlearn", *arguments])
    defaults = {name: p.default for name, p in inspect.signature(clue_fast.unlearn).parameters.items()}
    shared = ("criterion", "fraction", "scope", "strict", "permutations", "max_length")
    names = (
        *shared,
        "batch_size",
        "layer_lr",
        "retain_ratio",
        "forget_target",
        "master",
        "stages",
        "samples",
        "relearn",
    )
    for name in names:
        assert getattr(options, name) == defaults[name], name
    assert cli._circuit(options) is None
    for field in dataclasses.fields(CircuitSettings):
        value = getattr(CircuitSettings(), field.name)
        given = [*arguments, f"--circuit-{field.name.replace('_', '-')}", str(value)]
        for command in ("unlearn", "localize"):
            assert cli._circuit(cli._parser().parse_args([command, *given])) == CircuitSettings(), field.name
    assert cli._parser().parse_args(["unlearn", *arguments, "--forget-target", "none"]).forget_target is None
    options = cli._parser().parse_args(["evaluate", *arguments])
    defaults = {name: p.default for name, p in inspect.signature(workflow.evaluate_model).parameters.items()}
    for name in ("samples", "relearn", "seed"):
        assert getattr(options, name) == defaults[name], name
    options = cli._parser().parse_args(["localize", *arguments])
    defaults = {name: p.default for name, p in inspect.signature(clue_fast.localize).parameters.items()}
    for name in shared:
        assert getattr(options, name) == defaults[name], name


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
    assert figures["model"]["forget"]["count"] == 5
    assert "questions answered" in capsys.readouterr().out


def test_an_evaluation_in_depth(inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--forget", f"{inputs}/forget.jsonl", "--retain", f"{inputs}/retain.jsonl"]
    assert cli.main(["evaluate", f"{inputs}/model", *sets, "--samples", "2", "--relearn", "1", "--quiet"]) == 0
    table = capsys.readouterr().out
    for title in ("answered, best of 2", "answered before relearning 1", "answered after relearning 1"):
        assert [line.split()[0] for line in table.splitlines() if title in line] == ["forget"]


def test_an_evaluation_out_of_range(refuses) -> None:
    refuses("relearn 5 leaves none of the 5 records of the forget set", "evaluate", "--relearn", "5")
    refuses("samples -1 of the forget set", "evaluate", "--samples", "-1")


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
