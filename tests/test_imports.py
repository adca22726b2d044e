"""What importing the package loads, and that every name it promises is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

import clue_fast
from clue_fast.ops import available

HEAVY = ("triton", "transformers", "datasets", "matplotlib", "scipy", "peft")


def run(script: str) -> str:
    """Runs a script in a fresh interpreter and returns what it printed."""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_loads_nothing_heavy() -> None:
    """Nor do the modules that only need torch: what needs transformers says so when it is used."""
    loaded = run(
        "import sys, clue_fast\n"
        "import clue_fast.cli, clue_fast.data, clue_fast.env, clue_fast.evaluation, clue_fast.localization\n"
        "import clue_fast.ops, clue_fast.recording, clue_fast.selection, clue_fast.sites, clue_fast.statistics\n"
        "import clue_fast.sparse, clue_fast.objectives, clue_fast.trainer, clue_fast.unlearning\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert loaded == "[]"


def test_importing_alone_does_not_even_load_torch() -> None:
    assert run("import sys, clue_fast; print('torch' in sys.modules, clue_fast.__version__)") == (
        f"False {clue_fast.__version__}"
    )


def test_the_extension_loads_although_torch_was_not_imported_before() -> None:
    """Its symbols are torch's: whoever loads it must have loaded torch first."""
    reason = available()["cpp"]
    if reason is not None:
        pytest.skip(reason)
    script = "import clue_fast; from clue_fast.ops import backend; print(backend.available()['cpp'])"
    assert run(script) == "None"


@pytest.mark.parametrize("module", ["clue_fast", "clue_fast.patching"])
def test_a_patched_model_knows_the_criteria(module: str) -> None:
    script = (
        "import torch, warnings; from transformers import LlamaConfig, LlamaForCausalLM\n"
        "warnings.simplefilter('ignore')\n"
        f"from {module} import patch\n"
        "sizes = dict(vocab_size=9, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)\n"
        "patched = patch(LlamaForCausalLM(LlamaConfig(**sizes)))\n"
        "for group in ('forget', 'retain'):\n"
        "    with patched.record(group), torch.no_grad(): patched.model(torch.arange(9)[None])\n"
        "print(len(patched.scores('welch')))"
    )
    assert run(script) == "1"


def test_every_promised_name_is_there() -> None:
    assert sorted(clue_fast.__all__) == dir(clue_fast)
    for name in clue_fast.__all__:
        assert getattr(clue_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'astrology'"):
        clue_fast.astrology  # noqa: B018


@pytest.mark.parametrize(
    "package",
    [
        "criteria",
        "criteria.circuit",
        "data",
        "evaluation",
        "objectives",
        "ops",
        "recording",
        "sites",
        "sparse",
        "trainer",
    ],
)
def test_every_name_of_a_subpackage_is_there(package: str) -> None:
    module = __import__(f"clue_fast.{package}", fromlist=["__all__"])
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert missing == []


OLD_NAMES = {
    "training.UnlearnTrainer": "trainer.UnlearnTrainer",
    "training.NPO": "objectives.NPO",
    "training.stages.CLUE": "trainer.stages.CLUE",
    "localization.record_groups": "criteria.record_groups",
    "localization.CIRCUIT": "criteria.circuit.CIRCUIT",
    "localization.check_criterion": "criteria.check_criterion",
    "localization.circuit.discover": "criteria.circuit.discover",
    "patching.Patched": "recording.Patched",
    "workflow.load_model": "trainer.checkpoints.load_model",
    "localization.CircuitSettings": "config.CircuitConfig",
    "localization.circuit.CircuitSettings": "config.CircuitConfig",
    "pretraining.Recipe": "demo.pretraining.TrainConfig",
    "training.shrink": "trainer.scale_update",
    "training.shrinking.shrink": "trainer.update_scale.scale_update",
    "doctor.diagnosis": "env.diagnosis",
    "ops.sparse_adamw.sparse_adamw_": "ops.sparse_optimizer.sparse_adamw_",
    "ops.sparse_sgd.sparse_sgd_": "ops.sparse_optimizer.sparse_sgd_",
    "labels.HEADS": "data.collator.HEADS",
    "config.file.Settings": "config.schema.Settings",
    "data.labels.answer_mask": "data.collator.answer_mask",
    "objectives.registry.OBJECTIVES": "objectives.base.OBJECTIVES",
    "sites.model.unwrap": "internals.unwrap",
    "sparse.audit.snapshot": "sparse.snapshot",
}


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What each import by an old name said, all in one fresh interpreter."""
    script = ["import warnings"]
    for old, new in OLD_NAMES.items():
        module, _, name = old.rpartition(".")
        script += [
            "with warnings.catch_warnings(record=True) as caught:",
            "    warnings.simplefilter('always')",
            f"    from clue_fast.{module} import {name} as old",
            f"from clue_fast.{new.rpartition('.')[0]} import {new.rpartition('.')[2]} as new",
            f"print('{old}:', old is new, [str(w.message) for w in caught if 'clue_fast' in str(w.message)])",
        ]
    return dict(line.split(": ", 1) for line in run("\n".join(script)).splitlines())


@pytest.mark.parametrize(("old", "new"), OLD_NAMES.items())
def test_an_old_name_works_and_says_the_new_one(old: str, new: str, said: dict[str, str]) -> None:
    assert said[old].startswith("True") and said[old].count(f"is clue_fast.{new} now") == 1, said[old]
