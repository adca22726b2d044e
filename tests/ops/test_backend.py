"""Which backend runs an operator: the preference, what forces another, and what is said where one is missing."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from clue_fast import ops
from clue_fast.errors import BackendError, UnknownNameError
from clue_fast.ops import backend as backends

VARIABLE = backends.ENVIRONMENT_VARIABLE
X = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


def forget_choices() -> None:
    for function in (backends._launch, backends._load_extension, backends.extension):
        function.cache_clear()


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No choice that an earlier test caused, and none that a later one inherits."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(backends, "_warned", False)
    forget_choices()
    yield
    forget_choices()


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clue_fast._C", None)


@pytest.fixture
def with_extension() -> None:
    if (reason := backends.available()["cpp"]) is not None:
        pytest.skip(reason)


def test_every_operator_has_its_definition() -> None:
    assert set(backends.operators()) == {
        "gated_activation", "channel_statistics", "conflict_score", "sparse_linear", "sparse_optimizer",
    }  # fmt: skip
    assert all("reference" in implemented for implemented in backends.operators().values())


@pytest.mark.usefixtures("with_extension")
def test_cpu_prefers_cpp() -> None:
    choice = ops.choose("gated_activation", "cpu")
    assert (choice.name, choice.reason) == ("cpp", "the fastest for cpu")


@pytest.mark.usefixtures("without_extension")
def test_without_the_extension_the_reason_says_what_to_do() -> None:
    choice = ops.choose("gated_activation", "cpu")
    assert choice.name == "reference"
    assert "reinstall clue_fast with a C++ compiler" in choice.reason
    assert "not built" in str(ops.available()["cpp"])


def test_an_extension_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("undefined symbol: at_something")

    monkeypatch.setattr(backends.importlib, "import_module", fail)
    choice = ops.choose("gated_activation", "cpu")
    assert choice.name == "reference"
    assert "undefined symbol: at_something" in choice.reason
    assert "against this torch" in choice.reason


def test_an_extension_with_other_arguments_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    before = SimpleNamespace(build_info=lambda: {"torch": "2.13.0"})
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: before)
    choice = ops.choose("gated_activation", "cpu")
    assert choice.name == "reference"
    assert "from another version of clue_fast; reinstall it to rebuild" in choice.reason
    with pytest.raises(BackendError, match="another version"):
        ops.choose("gated_activation", "cpu", "cpp")


@pytest.mark.usefixtures("with_extension")
def test_an_extension_of_another_version_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "IMPLEMENTATIONS", dict(backends.IMPLEMENTATIONS))
    backends.register("gated_activation", ("reference", "cpp"), {"not_yet_written": print})
    choice = ops.choose("gated_activation", "cpu")
    assert choice.name == "reference"
    assert "another version and lacks not_yet_written; rebuild it" in choice.reason


def test_other_devices_fall_back_to_the_reference() -> None:
    assert ops.choose("gated_activation", "meta").name == "reference"


class TestOwnPreference:
    """sparse_linear has cuBLAS on NVIDIA; elsewhere, and for every other operator, Triton comes before PyTorch."""

    @pytest.fixture(autouse=True)
    def _interpreted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")

    @pytest.mark.parametrize(
        ("hip", "device", "expected"),
        [(None, "cuda", "reference"), ("6.3", "cuda", "triton"), (None, "xpu", "triton"), ("6.3", "xpu", "triton")],
    )
    def test_of_sparse_linear(
        self, monkeypatch: pytest.MonkeyPatch, hip: str | None, device: str, expected: str
    ) -> None:
        monkeypatch.setattr(torch.version, "hip", hip)
        choice = ops.choose("sparse_linear", device)
        assert choice.name == expected
        if expected == "reference":
            assert choice.reason == "the choice for cuda"
        assert ops.choose("sparse_linear", device, "triton").name == "triton"

    @pytest.mark.parametrize("device", ["cuda", "xpu"])
    def test_of_no_other(self, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
        monkeypatch.setitem(
            backends.BACKENDS, "cuda", replace(backends.BACKENDS["cuda"], unavailable_reason=lambda: "no")
        )
        for operator in set(backends.operators()) - {"sparse_linear"}:
            assert ops.choose(operator, device).name == "triton", operator


class TestForcing:
    @pytest.mark.parametrize("by_variable", [True, False])
    def test_forced(self, monkeypatch: pytest.MonkeyPatch, by_variable: bool) -> None:
        if by_variable:
            monkeypatch.setenv(VARIABLE, "reference")
        choice = ops.choose("gated_activation", "cpu", None if by_variable else "reference")
        assert (choice.name, choice.reason) == ("reference", f"forced by {VARIABLE if by_variable else 'backend='}")

    def test_the_argument_beats_the_variable(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "astrology")
        assert ops.choose("gated_activation", "cpu", "reference").name == "reference"

    @pytest.mark.usefixtures("with_extension")
    def test_a_changed_variable_is_seen_at_the_next_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        calls = []
        table = backends.IMPLEMENTATIONS
        original = table["gated_activation", "reference"]

        def noted(*arguments: object) -> None:
            calls.append(arguments)
            original.find("gated_activation")(*arguments)

        watched = replace(original, find={"gated_activation": noted}.__getitem__)
        monkeypatch.setitem(table, ("gated_activation", "reference"), watched)
        first = ops.gated_activation(X, X)
        assert not calls
        monkeypatch.setenv(VARIABLE, "reference")
        second = ops.gated_activation(X, X)
        assert len(calls) == 1
        torch.testing.assert_close(first, second)

    @pytest.fixture
    def without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As an operator would be that nobody has written in Triton."""
        monkeypatch.delitem(backends.IMPLEMENTATIONS, ("sparse_optimizer", "triton"))

    @pytest.mark.usefixtures("without_triton")
    def test_the_variable_holds_for_operators_that_have_the_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("triton")
        monkeypatch.setenv(VARIABLE, "triton")
        assert ops.choose("gated_activation", "cpu").name == "triton"
        choice = ops.choose("sparse_optimizer", "cpu")
        assert choice.name in ("cpp", "reference")
        assert "triton does not implement sparse_optimizer" in choice.reason

    @pytest.mark.usefixtures("without_triton")
    def test_the_argument_is_refused_where_the_operator_lacks_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        pytest.importorskip("triton")
        with pytest.raises(BackendError, match="sparse_optimizer has no triton backend; choose one of: reference"):
            ops.choose("sparse_optimizer", "cpu", "triton")

    @pytest.mark.parametrize(
        ("forced", "device", "message"),
        [
            ("cuda", "cpu", "CUDA"),
            ("triton", "cpu", "triton|no CUDA"),
            ("cpp", "cuda", r"cpp.*not on cuda|C\+\+ extension"),
        ],
    )
    def test_what_cannot_run_here_is_refused_with_the_reason(
        self, monkeypatch: pytest.MonkeyPatch, forced: str, device: str, message: str
    ) -> None:
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        with pytest.raises(BackendError, match=f"backend '{forced}', asked for by backend=, cannot run.*({message})"):
            ops.choose("gated_activation", device, forced)

    @pytest.mark.usefixtures("without_extension")
    def test_a_forced_backend_is_never_replaced_in_silence(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(VARIABLE, "cpp")
        with pytest.raises(BackendError, match=f"'cpp', asked for by {VARIABLE}, cannot run gated_activation"):
            ops.gated_activation(X, X)

    def test_unknown_names(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(UnknownNameError, match="unknown backend 'fpga'; choose one of: cpp, cuda"):
            ops.gated_activation(X, X, backend="fpga")
        monkeypatch.setenv(VARIABLE, "fpga")
        with pytest.raises(UnknownNameError, match="unknown backend 'fpga'"):
            ops.gated_activation(X, X)
        with pytest.raises(UnknownNameError, match="unknown operator 'softmax'"):
            ops.choose("softmax", "cpu")


class TestWarning:
    @pytest.mark.usefixtures("without_extension")
    def test_the_slow_backend_is_mentioned_once(self, caplog: pytest.LogCaptureFixture) -> None:
        with caplog.at_level(logging.WARNING, logger="clue_fast"):
            for _ in range(2):
                ops.gated_activation(X, X)
                ops.channel_statistics(X, torch.ones(3, dtype=torch.int8), torch.zeros(1, len(ops.FIELDS), 5).double())
        (message,) = caplog.messages
        assert "slower reference backend" in message
        assert "C++ compiler" in message

    @pytest.mark.usefixtures("without_extension")
    def test_not_to_those_who_asked_for_it(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with caplog.at_level(logging.WARNING, logger="clue_fast"):
            ops.gated_activation(X, X, backend="reference")
            monkeypatch.setenv(VARIABLE, "reference")
            ops.gated_activation(X, X)
        assert caplog.messages == []
