"""The plan as a whole, and as the command prints it; what is refused is one line and exit code 2."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from clue_fast import cli
from clue_fast.config import LocalizeConfig, ModelConfig, UnlearnConfig
from clue_fast.config.planning import PlanConfig
from clue_fast.planning import plan
from clue_fast.planning.table import ROWS

SMALL = (
    "hidden_size=64,intermediate_size=96,num_attention_heads=4,num_key_value_heads=2,num_hidden_layers=5,vocab_size=80"
)
FLAGS = ["--max-length", "16", "--batch-size", "2"]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.chdir(tmp_path)


def run(*arguments: str) -> int:
    return cli.main(["plan", *arguments, "--quiet"])


def test_the_command(capsys, tmp_path):
    assert run("llama", "--sizes", SMALL, *FLAGS, "--gpus", "4", "--parallel", "fsdp2", "--output", "plan.json") == 0
    text = capsys.readouterr().out
    assert "llama: LlamaForCausalLM" in text and "computed from shapes, not measured" in text
    assert "5 of 480 units selected (1.04%)" in text
    assert "selected units (clue_fast.sparse.fully_shard): torchrun --nproc_per_node 4 loop.py" in text
    assert "accelerate launch --use_fsdp --fsdp_version 2" in text
    assert all(len(line) == len(line.rstrip()) for line in text.splitlines())
    found = json.loads(Path("plan.json").read_text())
    assert found["config"]["gpus"] == 4 and found["objective"] == "undial"
    assert [one["name"] for one in found["trainings"]] == [
        "selected units",
        "all weights",
        "all, float32",
        "LoRA, r=16",
    ]
    table = {line[:25].strip(): line[25:].split() for line in text.splitlines()}
    peak = [float(cell.replace(",", "")) for cell in table[ROWS["peak"]]]
    sizes = [found["localization_footprint"]["peak"], *(one["footprint"]["peak"] for one in found["trainings"])]
    assert peak == pytest.approx([size / 2**30 for size in sizes], abs=0.0006)


def test_nothing_is_loaded_and_nothing_is_left(tmp_path, trained_beside):
    """Of eight billion weights: no storage of a gigabyte is ever made."""
    trained_beside("all weights")
    before = torch.get_rng_state()
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = plan("llama3-8b", PlanConfig(fraction=0.05, batch_size=1, max_length=64))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most < 2**20  # kilobytes
    assert found.parameters == 8_030_261_248 and found.units == 32 * 14336
    assert found.selected == 32 * round(0.05 * 14336)
    assert torch.equal(torch.get_rng_state(), before) and list(tmp_path.iterdir()) == []


def test_a_file_of_settings(capsys):
    Path("plan.yaml").write_text("sizes: {hidden_size: 64, num_attention_heads: 4, vocab_size: 80}\ngpus: 65\n")
    assert run("llama", "--config", "plan.yaml") == 2
    assert "plan.yaml, line 2: gpus 65 is not a whole number from 1 to 64" in capsys.readouterr().err
    Path("plan.yaml").write_text(
        "sizes: {hidden_size: 64, num_attention_heads: 4, num_hidden_layers: 4}\nmax_length: 8\n"
    )
    assert run("llama", "--config", "plan.yaml", "--batch-size", "1", "--layers", "0.5:1") == 0
    text = capsys.readouterr().out
    assert "clue-fast unlearn MODEL --forget FORGET --retain RETAIN --output unlearned" in text
    assert "--layers 0.5:1" in text and "every layer from 0.5 to 1 of the depth" in text
    assert "in later epochs" in text and ROWS["lower_layers"] in text


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("lama", [], "unknown architecture 'lama'; choose one of: a folder with a config.json"),
        ("llama", ["--sizes", "hidden=3"], "llama has no size 'hidden'"),
        ("llama", ["--sizes", "hidden_size=65"], "65"),
        (
            "mamba",
            ["--sizes", "num_hidden_layers=2,hidden_size=32"],
            "MambaForCausalLM has no site of kind mlp, expert",
        ),
        ("llama", ["--gpus", "0"], "gpus 0 is not a whole number from 1 to 64"),
        ("llama", ["--gpus", "65"], "gpus 65 is not a whole number from 1 to 64"),
        ("llama", ["--gpus", "64"], "gpus 64 with a batch_size of 8 each take 512 forget records a step"),
        ("llama", ["--parallel", "zero3"], "unknown parallel 'zero3'; choose one of: ddp, fsdp2"),
        ("llama", ["--fraction", "0"], "fraction 0.0 is outside (0, 1]"),
        ("llama", ["--fraction", "1.5"], "fraction 1.5 is outside (0, 1]"),
        ("llama", ["--fraction", "nan"], "fraction nan is outside (0, 1]"),
        ("llama", ["--criterion", "astrology"], "unknown criterion 'astrology'"),
        ("llama", ["--criterion", "circuit"], "criterion 'circuit' cannot be planned"),
        ("llama", ["--objective", "astrology"], "unknown objective 'astrology'"),
        ("llama", ["--objective", "rmu"], "objective 'rmu' cannot be planned"),
        ("llama", ["--dtype", "int8"], "unknown dtype 'int8'"),
        ("llama", ["--kinds", "astrology"], "unknown kind of site 'astrology'"),
        ("llama", ["--kinds", "mlp,attention"], "kinds 'attention' cannot be planned: heads are found by running"),
        ("llama", ["--layers", "1:0.5"], "layers (1.0, 0.5) is no part of the depth"),
        ("llama", ["--layers", "0.9:1", "--criterion", "circuit"], "criterion 'circuit' cannot be planned"),
        ("llama", ["--layers", "0.3:0.35"], "none of them lies between 0.3 and 0.35 of the depth"),
        ("llama", ["--lower-layers-gb", "-1"], "lower_layers_gb -1.0 is"),
        ("llama", ["--sizes", "4096"], "sizes 4096 are not whole numbers by name"),
        ("llama", ["--batch-size", "0"], "batch_size 0 is not a positive integer"),
        ("llama", ["--max-length", "0"], "max_length 0 is not a positive integer"),
        ("llama", ["--max-length", "9", "--answer-tokens", "10"], "answer_tokens 10 is more than the 9 tokens"),
        ("llama", ["--gpu-memory", "0"], "gpu_memory 0.0 is not a number above 0"),
        ("llama", ["--lora-rank", "0"], "lora_rank 0 is not a positive integer"),
        ("mixtral", ["--criterion", "fisher"], "those of model.layers.0.mlp.experts[0] are in no linear layer"),
    ],
)
def test_bad_input(model, flags, message, capsys, tmp_path):
    small = {
        "llama": SMALL,
        "mixtral": SMALL + ",num_local_experts=2,num_experts_per_tok=2",
    }.get(model)
    sizes = ["--sizes", small] if small and "--sizes" not in flags else []
    assert run(model, *sizes, *flags, "--output", "plan.json") == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("clue-fast: ") and "\n" not in error and message in error
    assert list(tmp_path.iterdir()) == []


def test_settings_of_others_are_theirs():
    """Default, help and choices stand in one place."""
    for kind in (LocalizeConfig, UnlearnConfig, ModelConfig):
        theirs = {one.name: one for one in dataclasses.fields(kind)}
        for one in dataclasses.fields(PlanConfig):
            if one.name in theirs:
                assert (one.default, one.metadata) == (theirs[one.name].default, theirs[one.name].metadata), one.name
