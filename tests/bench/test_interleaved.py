"""The sampler of the benchmarks, on a clock that the cases themselves turn."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from bench import interleaved, machine
from bench.interleaved import Comparison, Ratio, Result, Target


class Clock:
    """Stands in for time.perf_counter; the machine becomes slower by `drift` a call."""

    def __init__(self, drift: float = 0.0) -> None:
        self.now, self.speed, self.drift = 0.0, 1.0, drift
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def case(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * self.speed
            self.speed *= 1 + self.drift

        return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(machine.time, "perf_counter", clock)
    return clock


def test_cases_take_turns_and_each_begins_as_often(clock: Clock) -> None:
    cases = {name: clock.case(name, 0.01) for name in "abc"}
    samples, repeats = interleaved.sample(cases, seconds=0.45)
    assert repeats == {"a": 1, "b": 1, "c": 1}
    assert [len(times) for times in samples.values()] == [15, 15, 15]
    rounds = [tuple(clock.calls[start : start + 3]) for start in range(6, len(clock.calls), 3)]
    assert rounds == [("a", "b", "c"), ("b", "c", "a"), ("c", "a", "b")] * 5


def test_a_short_call_is_repeated_within_a_sample(clock: Clock) -> None:
    samples, repeats = interleaved.sample({"short": clock.case("short", 1e-5), "long": clock.case("long", 0.1)}, 1.0)
    assert repeats == {"short": 200, "long": 1}
    assert samples["short"] == pytest.approx([1e-5] * len(samples["short"]))


def test_cases_that_take_about_as_long_are_called_equally_often() -> None:
    """Whichever of two is the quicker by chance: the first call of a sample finds other caches than the next."""
    repeats = interleaved.repeats_of({"slow": 1e-2, "a": 9e-4, "b": 5e-4, "quick": 1e-5})
    assert repeats == {"slow": 1, "a": 4, "b": 4, "quick": 200}


def test_a_drifting_machine_does_not_bend_the_ratio(clock: Clock) -> None:
    """Ten times slower at the end than at the beginning; one case after the other would be off by a factor of 3."""
    clock.drift = 0.01
    result = interleaved.run(
        Comparison("t", {"one": clock.case("one", 0.01), "two": clock.case("two", 0.02)}, seconds=4)
    )
    assert max(result.samples["one"]) > 8 * min(result.samples["one"])
    assert result.ratio("two", "one").value == pytest.approx(2.0, rel=0.02)


def test_an_outlier_is_kept_but_does_not_count() -> None:
    result = Result("t", {"a": [1.0] * 15, "b": [2.0] * 14 + [90.0]})
    assert result.ratio("b", "a") == Ratio(2.0, 2.0, 2.0)
    assert max(result.as_dict()["samples"]["b"]) == 90.0


@pytest.mark.parametrize(
    ("ratio", "verdict"),
    [(Ratio(0.9, 0.8, 1.2), "met"), (Ratio(1.1, 0.9, 1.2), "missed within noise"), (Ratio(1.2, 1.1, 1.3), "MISSED")],
)
def test_verdict(ratio: Ratio, verdict: str) -> None:
    assert Target("a", "b", 1.0).verdict(ratio) == f"at most 1.000: {verdict}"


def test_table_shows_every_case_and_target() -> None:
    result = Result("forward", {"stock": [0.002] * 12, "ours": [0.001] * 12}, targets=(Target("ours", "stock", 0.6),))
    lines = result.table().splitlines()
    assert lines[0] == "forward (12 rounds)"
    assert lines[3].split() == ["ours", "1.000", "1.000", "1.000", "to", "1.000", "0.500", "[0.500,", "0.500]"]
    assert lines[4].strip() == "ours / stock: 0.500 [0.500, 0.500], at most 0.600: met"


def test_processor_time_leaves_waiting_out(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(machine, "_processor_time", False)
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    assert machine.describe()["clock"] == "wall"
    machine.use_processor_time()
    assert machine.describe()["clock"] == "processor" and threads == [1]
    assert interleaved._time(lambda: time.sleep(0.2), 1) < 0.1
