"""Scores that a pass writes as it records: those of the statistics bit for bit, in no launch more, and never stale.

They are held against ``conflict_score`` of the same backend on the same statistics, whose formulas
``tests/ops/test_conflict_score.py`` checks. It runs the same closed form on the same float64 sums, so that no rounding
is allowed for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import clue_fast
from clue_fast.criteria import criterion as register_criterion
from clue_fast.criteria.registry import CRITERIA
from clue_fast.errors import NonFiniteError, PatchError, SettingError
from clue_fast.ops import CLOSED_FORMS, CRITERIA_OPS, conflict_score
from clue_fast.recording import Patched
from clue_fast.statistics import Statistics
from tests.models.families import make_batch, make_model
from tests.models.test_families import compiled_batch
from tests.recording.test_recording import IDS

MODELS = {  # gated activations, plain MLPs, heads, experts
    "gated": ("llama", ("mlp",)),
    "packed": ("phi3", ("mlp",)),
    "plain": ("gpt2", ("mlp",)),
    "heads": ("llama", ("attention",)),
    "experts": ("mixtral", ("expert",)),
}
BACKENDS = ["reference", "cpp", "triton"]
PROPERTY = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def patch(name: str, backend: str | None = None) -> tuple[Any, Patched]:
    family, kinds = MODELS[name]
    model = make_model(family)
    return model, clue_fast.patch(model, kinds=kinds, backend=backend)


def spoil(model: Any, token: int = 10) -> list[Any]:
    """Makes every site see NaN where the batch holds a token, which is in the second row of IDS."""

    def spoiled(_: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
        return torch.where((args[0] == token)[..., None], float("nan"), y)

    return [model.get_input_embeddings().register_forward_hook(spoiled)]


def computed(statistics: Statistics, criterion: str, backend: str | None = None) -> Tensor:
    """The scores of all units by themselves."""
    gradients = statistics.gradient_values if CLOSED_FORMS[criterion].gradients else None
    arguments = statistics.values, statistics.count, statistics.offsets
    return conflict_score(*arguments, criterion, gradient_statistics=gradients, backend=backend)


def check_live(patched: Patched, criterion: str, backend: str | None = None) -> None:
    """What was written is what the statistics give; NaN where nothing was counted yet."""
    live = patched.statistics.live
    assert live is not None and live.fresh and live.criterion == criterion
    expected = computed(patched.statistics, criterion, backend)
    assert torch.equal(live.values.nan_to_num(-7.0), expected.nan_to_num(-7.0))


@pytest.fixture
def computations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Criteria by which all units were scored, one a launch."""
    found: list[str] = []
    score = Statistics._score

    def counting(self: Statistics, criterion: str, backend: str | None) -> Tensor:
        found.append(criterion)
        return score(self, criterion, backend)

    monkeypatch.setattr(Statistics, "_score", counting)
    return found


class TestAfterEachPass:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("name", MODELS)
    def test_all_kinds(self, name: str, backend: str, computations: list[str]) -> None:
        criterion = "difference"
        model, patched = patch(name, backend)
        with torch.no_grad():
            for group in ("retain", "forget"):
                with patched.record(group, score=criterion):
                    for rows in (IDS[:1, :1], IDS[:2], IDS[2:]):  # the first of one token
                        model(rows)
                        check_live(patched, criterion, backend)
            with patched.record("forget", score=criterion):
                model(IDS, token_group=torch.tensor([1, 2, 0, 2]))
                check_live(patched, criterion, backend)
        computations.clear()
        scores = patched.scores()
        assert computations == []
        assert torch.equal(torch.cat(list(scores.values())), computed(patched.statistics, criterion, backend))
        assert scores.criterion == criterion

    @pytest.mark.parametrize("backend", ["cpp", "triton"])
    @pytest.mark.parametrize("name", MODELS)
    def test_after_each_backward(self, name: str, backend: str) -> None:
        criterion = "attribution"
        model, patched = patch(name, backend)
        with patched.record("forget", gradients=True, score=criterion):
            for group in ([1, 1, 2, 2], [2, 0, 1, 1]):
                loss = model(IDS, labels=IDS, token_group=torch.tensor(group)).loss
                check_live(patched, criterion, backend)
                before = patched.scores()
                loss.backward()
                check_live(patched, criterion, backend)
                after = patched.scores()
                assert not any(torch.equal(before[site], after[site]) for site in list(before)[:2])

    @pytest.mark.parametrize("criterion", CRITERIA_OPS)
    def test_all_criteria(self, criterion: str, computations: list[str]) -> None:
        model, patched = patch("gated")
        with patched.record("forget", gradients=True, score=criterion):
            model(IDS, labels=IDS, token_group=torch.tensor([1, 2, 1, 2])).loss.backward()
            computations.clear()
            live = patched.scores()
        assert computations == []
        again = clue_fast.score(patched.statistics.merge(patched.statistics.empty()), criterion)
        assert computations == [criterion]
        assert all(torch.equal(live[site], again[site]) for site in live)

    def test_other_criteria_and_earlier_scores(self, computations: list[str]) -> None:
        """What was read stays as it was; another criterion is computed."""
        model, patched = patch("gated")
        with torch.no_grad(), patched.record("forget", statistics=("variance", "abs_mean"), score="welch"):
            model(IDS, token_group=torch.tensor([1, 2, 1, 2]))
            first = patched.scores()
            kept = [scores.clone() for scores in first.values()]
            model(IDS.flip(0) + 1)
            assert all(torch.equal(*pair) for pair in zip(kept, first.values(), strict=True))
            computations.clear()
            assert patched.scores("ratio").criterion == "ratio"
            assert computations == ["ratio"]
            check_live(patched, "welch")

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_gradient_checkpointing(self, reentrant: bool) -> None:
        model, patched = patch("gated")
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        with patched.record("forget", gradients=True, score="attribution"):
            for _ in range(2):
                loss = model(IDS, labels=IDS, token_group=torch.tensor([1, 2, 1, 2])).loss
                check_live(patched, "attribution")
                loss.backward()
                check_live(patched, "attribution")

    def test_tokens_that_are_not_finite_are_left_out(self) -> None:
        model, patched = patch("gated")
        spoil(model)
        with torch.no_grad(), patched.record("forget", score="difference", on_nonfinite="count"):
            model(IDS, token_group=torch.tensor([2, 1, 1, 2]))
            assert int(patched.statistics.nonfinite.sum()) > 0
            check_live(patched, "difference")
            assert all(bool(torch.isfinite(scores).all()) for scores in patched.scores().values())

    @pytest.mark.parametrize("name", ["gated", "plain", "experts"])
    def test_compiled(self, name: str, computations: list[str]) -> None:
        model, patched = patch(name)
        batch = compiled_batch(MODELS[name][0])
        group = torch.randint(0, 3, batch["input_ids"].shape, dtype=torch.int8)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with patched.record("forget", score="difference"), torch.no_grad():
            for _ in range(2):
                compiled(**batch, token_group=group)
                check_live(patched, "difference")
            computations.clear()
            patched.scores()
            assert computations == []
        with patched.record("forget", gradients=True, score="difference"):
            compiled(**batch, token_group=group).logits.square().mean().backward()
            check_live(patched, "difference")
        torch.compiler.reset()

    def test_compiled_code_leaves_attribution_to_who_asks(self, computations: list[str]) -> None:
        """Also between forward and backward, and after what an earlier pass wrote."""
        model, patched = patch("gated")
        batch = compiled_batch("llama")
        group = torch.randint(0, 3, batch["input_ids"].shape, dtype=torch.int8)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with patched.record("forget", gradients=True, score="attribution"):
            model(**batch, token_group=group).logits.square().mean().backward()
            for _ in range(2):
                loss = compiled(**batch, token_group=group).logits.square().mean()
                for step in (lambda: None, loss.backward):
                    step()
                    computations.clear()
                    found = torch.cat(list(patched.scores().values()))
                    assert computations == ["attribution"]
                    assert torch.equal(found, computed(patched.statistics, "attribution"))
        torch.compiler.reset()


class Launches(TorchDispatchMode):
    """Everything that is launched: operators of torch and of the extension but for views, and Triton kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.names: list[str] = []
        try:
            from clue_fast.kernels.channel_statistics import channel_statistics_fold_kernel as kernel
        except ImportError:
            return
        run = type(kernel).run

        def counting(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.names.append(kernel.__name__)
            with _disable_current_modes():  # the interpreter copies arguments by operators of torch
                return run(kernel, *args, **kwargs)

        monkeypatch.setattr(type(kernel), "run", counting)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def launched(monkeypatch: pytest.MonkeyPatch, name: str, backend: str, score: str | None, gradients: bool) -> list[str]:
    """What a pass launches while recording, with its backward if that is recorded."""
    model, patched = patch(name, backend)
    group = torch.tensor([1, 2, 1, 2])
    with (
        torch.set_grad_enabled(gradients),
        patched.record("forget", gradients=gradients, score=score),
        monkeypatch.context() as context,
        Launches(context) as launches,
    ):
        loss = model(IDS, token_group=group).logits.mean()
        if gradients:
            loss.backward()
    return launches.names


@pytest.mark.parametrize("backend", ["cpp", "triton"])
@pytest.mark.parametrize("name", MODELS)
class TestLaunches:
    @pytest.mark.parametrize("criterion", ["difference", "welch"])
    def test_none_more_than_recording_alone(
        self, name: str, backend: str, criterion: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        alone = launched(monkeypatch, name, backend, None, gradients=False)
        record, fold = {
            "cpp": ("clue_fast_cpp.gated_activation_record.default", "clue_fast_cpp.channel_statistics.default"),
            "triton": ("gated_activation_record_fwd_kernel", "channel_statistics_fold_kernel"),
        }[backend]
        assert record in alone or fold in alone
        assert launched(monkeypatch, name, backend, criterion, gradients=False) == alone

    def test_nor_backward(self, name: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        alone = launched(monkeypatch, name, backend, None, gradients=True)
        assert launched(monkeypatch, name, backend, "attribution", gradients=True) == alone


class TestStale:
    @staticmethod
    def record(name: str = "gated", **asked: Any) -> tuple[Any, Patched]:
        model, patched = patch(name)
        with torch.no_grad(), patched.record("forget", score="difference", **asked):
            model(IDS, token_group=torch.tensor([1, 2, 1, 2]))
        return model, patched

    @staticmethod
    def check_computed_once(patched: Patched, computations: list[str]) -> None:
        computations.clear()
        for _ in range(2):
            found = torch.cat(list(patched.scores().values()))
            assert torch.equal(found, computed(patched.statistics, "difference"))
        assert computations == ["difference"]
        check_live(patched, "difference")

    @pytest.mark.parametrize("name", MODELS)
    def test_a_skipped_batch(self, name: str, computations: list[str]) -> None:
        model, patched = self.record(name)
        before = patched.scores()
        handles = spoil(model)
        with torch.no_grad(), patched.record("forget", score="difference", on_nonfinite="skip_batch"):
            model(IDS)
            with pytest.raises(NonFiniteError):  # until the next pass or the end of the block takes it back
                patched.scores()
        assert int(patched.statistics.skipped) == 1
        self.check_computed_once(patched, computations)
        after = patched.scores()
        assert all(torch.equal(before[site], after[site]) for site in before)
        for handle in handles:
            handle.remove()
        with torch.no_grad(), patched.record("forget", score="difference", on_nonfinite="skip_batch"):
            model(IDS)
            check_live(patched, "difference")

    def test_a_batch_skipped_before_another(self, computations: list[str]) -> None:
        model, patched = self.record("experts")
        handles = spoil(model)
        with torch.no_grad(), patched.record("forget", score="difference", on_nonfinite="skip_batch"):
            model(IDS)
            for handle in handles:
                handle.remove()
            model(IDS[:1, :1])  # most experts see no token
            self.check_computed_once(patched, computations)

    def test_merging(self, computations: list[str]) -> None:
        _, patched = self.record()
        other, others = self.record()
        with torch.no_grad(), others.record("forget"):
            other(IDS.flip(1))
        patched.statistics.add(others.statistics)
        self.check_computed_once(patched, computations)

    def test_merging_before_a_block(self) -> None:
        """Its passes may leave out experts: their scores are made right when it begins."""
        model, patched = self.record("experts")
        other, others = self.record("experts")
        with torch.no_grad(), others.record("forget"):
            other(IDS.flip(1))
        patched.statistics.add(others.statistics)
        with torch.no_grad(), patched.record("forget", score="difference"):
            check_live(patched, "difference")
            model(IDS[:1, :1])
            check_live(patched, "difference")

    def test_resetting(self, computations: list[str]) -> None:
        model, patched = self.record()
        patched.statistics.reset()
        with pytest.raises(PatchError, match="no forget token was recorded"):
            patched.scores()
        with torch.no_grad(), patched.record("forget", score="difference"):
            model(IDS, token_group=torch.tensor([1, 2, 1, 2]))
            patched.statistics.reset()
            model(IDS, token_group=torch.tensor([2, 1, 1, 2]))
            self.check_computed_once(patched, computations)

    def test_recording_without(self, computations: list[str]) -> None:
        """Nothing is kept then, and scores are computed whenever they are asked for."""
        model, patched = self.record()
        with torch.no_grad(), patched.record("forget"):
            for _ in range(2):
                computations.clear()
                model(IDS)
                found = torch.cat(list(patched.scores().values()))
                assert torch.equal(found, computed(patched.statistics, "difference"))
                assert computations == ["difference"]
        assert patched.statistics.live is None

    @pytest.mark.parametrize("name", MODELS)
    @pytest.mark.parametrize("earlier", [None, "forget_attribution"])
    def test_a_backward_of_an_earlier_block(self, name: str, earlier: str | None, computations: list[str]) -> None:
        model, patched = patch(name)
        with patched.record("forget", gradients=True, score=earlier):
            late = model(IDS, token_group=torch.tensor([1, 2, 1, 2])).logits.square().mean()
        with patched.record("forget", gradients=True, score="attribution"):
            model(IDS, token_group=torch.tensor([2, 1, 1, 2])).logits.square().mean().backward()
            check_live(patched, "attribution")
            late.backward()
            computations.clear()
            for _ in range(2):
                found = torch.cat(list(patched.scores().values()))
                assert torch.equal(found, computed(patched.statistics, "attribution"))
            assert computations == ["attribution"]

    def test_another_criterion(self) -> None:
        model, patched = self.record(statistics=("variance", "abs_mean"))
        with torch.no_grad(), patched.record("forget", score="ratio"):
            check_live(patched, "ratio")
            model(IDS)
            check_live(patched, "ratio")
        assert patched.scores().criterion == "ratio"


class TestSequences:
    """Whatever is done in whatever order: what is read is what the statistics give."""

    def forward(self) -> None:
        rows = self.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))
        group = torch.tensor([self.draw(st.integers(0, 2)) for _ in rows])
        logits = self.model(IDS[rows][:, : self.draw(st.integers(1, 7))], token_group=group).logits
        if self.gradients and self.draw(st.booleans()):
            logits.square().mean().backward()

    def skip(self) -> None:
        handles = spoil(self.model)
        self.model(IDS[:2])  # has the token that is not finite
        for handle in handles:
            handle.remove()
        self.model(IDS[2:3, :2])

    def merge(self) -> None:
        self.patched.statistics.add(self.other)

    def reset(self) -> None:
        self.patched.statistics.reset()

    def read(self) -> None:
        try:
            found = torch.cat(list(self.patched.scores().values()))
        except PatchError as error:
            assert "token was recorded" in str(error)
        else:
            expected = computed(self.patched.statistics, self.criterion or "difference")
            assert torch.equal(found.nan_to_num(-7.0), expected.nan_to_num(-7.0))

    @PROPERTY
    @given(data=st.data(), name=st.sampled_from(["gated", "plain", "heads", "experts"]))
    def test_any(self, data: st.DataObject, name: str) -> None:
        self.draw: Callable[..., Any] = data.draw
        self.model, self.patched = patch(name)
        other, others = patch(name)
        with others.record("retain", gradients=True):
            other(IDS).logits.mean().backward()
        self.other = others.statistics
        self.patched.statistics.allocate_gradients()
        steps = st.lists(
            st.sampled_from([self.forward, self.forward, self.skip, self.merge, self.reset, self.read]), max_size=5
        )
        for _ in range(self.draw(st.integers(1, 3))):
            self.criterion = self.draw(st.sampled_from([None, *CRITERIA_OPS]))
            self.gradients = self.criterion is not None and CLOSED_FORMS[self.criterion].gradients
            statistics = ("max_abs", "attribution") if self.gradients else ("max_abs",)  # taken with all others
            how = {"gradients": self.gradients, "score": self.criterion, "statistics": statistics}
            with self.patched.record("forget", on_nonfinite="skip_batch", **how):
                for step in self.draw(steps):
                    step()
            self.read()


class TestBadInput:
    def test_no_closed_form(self) -> None:
        _, patched = patch("gated")
        for name in ("fisher", "nonsense"):
            with (
                pytest.raises(SettingError, match=rf"'{name}' is no closed form .* difference, .* localize"),
                patched.record("new", score=name),
            ):
                pass
        assert patched.statistics.groups == ["forget", "retain"]

    def test_a_criterion_of_ones_own(self) -> None:
        @register_criterion(needs="activations")
        def peak(measured: Any) -> Tensor:
            """Source: mine."""
            return measured.forget.max_abs

        model, patched = patch("gated")
        with pytest.raises(SettingError, match="'peak' is no closed form"), patched.record("forget", score="peak"):
            pass
        with torch.no_grad(), patched.record("forget"):
            model(IDS, token_group=torch.tensor([1, 2, 1, 2]))
            assert patched.scores("peak").criterion == "peak"
        del CRITERIA["peak"]

    @pytest.mark.parametrize(("recorded", "missing"), [("forget", "retain"), ("retain", "forget"), ("other", "forget")])
    def test_a_group_that_was_never_recorded(self, recorded: str, missing: str) -> None:
        model, patched = patch("gated")
        with (
            torch.no_grad(),
            patched.record(recorded, score="difference"),
            pytest.raises(PatchError, match=f"no {missing} token was recorded .* record group '{missing}' first"),
        ):
            model(IDS)
            patched.scores()

    def test_gradients_that_are_not_recorded(self) -> None:
        model, patched = patch("gated")
        with (
            pytest.raises(PatchError, match=r"'attribution' reads .* this block does not record; add gradients=True"),
            patched.record("forget", score="attribution"),
        ):
            pass
        with torch.no_grad(), patched.record("retain"):
            model(IDS)
        with (
            pytest.raises(PatchError, match="group 'retain' was recorded without"),
            patched.record("forget", gradients=True, score="attribution"),
        ):
            pass
        assert not patched._recorder.recording and patched.statistics.gradient_values is None
        patched.statistics.reset()
        with patched.record("forget", gradients=True, score="attribution"):
            model(**make_batch("llama")).logits.mean().backward()
