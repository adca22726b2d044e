"""Comparisons on a machine that drifts: every case once a round, the rounds in turn, all samples kept.

pytest-benchmark runs one case after the other, so that whatever else the machine does in between looks like a
difference. So what it is given as a case is a whole comparison, whose ways to do the work take turns; a ratio is taken
round by round.
"""

from __future__ import annotations

import gc
import itertools
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from bench import machine

Case = Callable[[], object]

SHORTEST_SAMPLE = 2e-3  # seconds; faster calls are repeated within a sample
ROUNDS = (11, 301)


@dataclass(frozen=True)
class Ratio:
    """Median over the rounds of one case's time over another's, with a 95 % bootstrap interval of it."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Target:
    """What a comparison is held to: the time of `case` is at most `at_most` times that of `against`."""

    case: str
    against: str
    at_most: float

    def verdict(self, ratio: Ratio) -> str:
        """Whether a ratio meets the target, as far as its interval allows to say."""
        met = "met" if ratio.value <= self.at_most else "MISSED" if ratio.low > self.at_most else "missed within noise"
        return f"at most {self.at_most:.3f}: {met}"


@dataclass
class Comparison:
    """Cases that do the same work in different ways.

    Attributes:
        title: what is compared, with its sizes and dtype.
        cases: name -> the callable; the first is what the others are put beside.
        targets: what must hold between them.
        seconds: how long sampling takes, about.
    """

    title: str
    cases: Mapping[str, Case]
    targets: Sequence[Target] = ()
    seconds: float = 10.0


@dataclass(frozen=True)
class Result:
    """The samples of a comparison.

    Attributes:
        samples: case -> seconds a call, one a round, in the order of the rounds.
        repeats: case -> calls that a sample is the mean of.
    """

    title: str
    samples: dict[str, list[float]]
    repeats: dict[str, int] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()

    def ratio(self, case: str, against: str) -> Ratio:
        """The time of a case over that of another, round by round."""
        ratios = [a / b for a, b in zip(self.samples[case], self.samples[against], strict=True)]
        choose = random.Random(0)
        medians = sorted(statistics.median(choose.choices(ratios, k=len(ratios))) for _ in range(1000))
        return Ratio(statistics.median(ratios), medians[25], medians[974])

    def ratios(self) -> dict[str, dict[str, float]]:
        """The time of every case over that of the first, and of every target: value and interval."""
        first = next(iter(self.samples))
        pairs = [(name, first) for name in self.samples if name != first]
        pairs += [(target.case, target.against) for target in self.targets]
        return {f"{case} / {against}": asdict(self.ratio(case, against)) for case, against in pairs}

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Milliseconds and ratio to the first case, a row a case; then the targets, and whether they are met."""
        first = next(iter(self.samples))
        width = max(len(name) for name in self.samples)
        rounds = len(self.samples[first])
        lines = [
            f"{self.title} ({rounds} rounds)",
            f"  {'case':<{width}}  {'median ms':>10} {'lowest':>10} {'quartiles':>21}  over {first}",
        ]
        for name, times in self.samples.items():
            low, _, high = statistics.quantiles(times, n=4)
            milliseconds = f"{1e3 * statistics.median(times):>10.3f} {1e3 * min(times):>10.3f}"
            quartiles = f"{1e3 * low:.3f} to {1e3 * high:.3f}"
            lines.append(f"  {name:<{width}}  {milliseconds} {quartiles:>21}  {self.ratio(name, first)}")
        for target in self.targets:
            ratio = self.ratio(target.case, target.against)
            lines.append(f"  {target.case} / {target.against}: {ratio}, {target.verdict(ratio)}")
        return "\n".join(lines)


def run(comparison: Comparison) -> Result:
    """Samples the cases of a comparison in turn."""
    samples, repeats = sample(comparison.cases, comparison.seconds)
    return Result(comparison.title, samples, repeats, tuple(comparison.targets))


class Sampler:
    """Times all cases of a comparison, once a round; each round begins with another case.

    Attributes:
        rounds: how many fill the time, about.
        samples: seconds a call by case, one sample a round.
        repeats: calls a sample by case.
    """

    def __init__(self, cases: Mapping[str, Case], seconds: float) -> None:
        self._cases = cases
        for case in cases.values():
            case()  # warms caches, allocators and thread pools
        once = {name: _time(case, 1) for name, case in cases.items()}
        self.repeats = repeats_of(once)
        self.rounds = min(max(round(seconds / sum(once[n] * self.repeats[n] for n in cases)), ROUNDS[0]), ROUNDS[1])
        self.samples: dict[str, list[float]] = {name: [] for name in cases}
        self._orders = itertools.cycle(rounds_of(list(cases), len(cases)))

    def round(self) -> None:
        """Runs every case once."""
        collecting = gc.isenabled()
        gc.disable()
        try:
            for name in next(self._orders):
                self.samples[name].append(_time(self._cases[name], self.repeats[name]))
            gc.collect(0)
        finally:
            if collecting:
                gc.enable()


def sample(cases: Mapping[str, Case], seconds: float) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Runs all cases once a round until about `seconds` have passed.

    Returns:
        Seconds a call by case, one sample a round; calls a sample by case.
    """
    sampler = Sampler(cases, seconds)
    for _ in range(sampler.rounds):
        sampler.round()
    return sampler.samples, sampler.repeats


def repeats_of(once: Mapping[str, float]) -> dict[str, int]:
    """How often each case is called in a sample, from the seconds of one call.

    The first call of a sample finds the caches as another case left them. So cases that take about as long, each at
    most twice the next quicker one, are called equally often: with two calls against four, one that took as long came
    out as .73 of another.
    """
    repeats: dict[str, int] = {}
    quicker = None
    for name in sorted(once, key=lambda name: once[name]):
        alike = quicker is not None and once[name] <= 2 * once[quicker]
        repeats[name] = repeats[quicker] if alike and quicker else max(1, round(SHORTEST_SAMPLE / once[name]))
        quicker = name
    return repeats


def rounds_of(names: Sequence[str], count: int) -> Iterator[list[str]]:
    """The order of the cases in each round: in turn, each round begun by the next."""
    for number in range(count):
        start = number % len(names)
        yield [*names[start:], *names[:start]]


def _time(case: Case, repeats: int) -> float:
    machine.wait()
    start = machine.seconds()
    for _ in range(repeats):
        case()
    machine.wait()
    return (machine.seconds() - start) / repeats
