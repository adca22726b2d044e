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
        "import clue_fast.cli, clue_fast.data, clue_fast.doctor, clue_fast.evaluation, clue_fast.localization\n"
        "import clue_fast.ops, clue_fast.patching, clue_fast.selection, clue_fast.sites, clue_fast.statistics\n"
        "import clue_fast.training, clue_fast.workflow\n"
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


def test_every_promised_name_is_there() -> None:
    assert sorted(clue_fast.__all__) == dir(clue_fast)
    for name in clue_fast.__all__:
        assert getattr(clue_fast, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'astrology'"):
        clue_fast.astrology  # noqa: B018


@pytest.mark.parametrize("package", ["ops", "training", "evaluation", "localization"])
def test_every_name_of_a_subpackage_is_there(package: str) -> None:
    module = __import__(f"clue_fast.{package}", fromlist=["__all__"])
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert missing == []
