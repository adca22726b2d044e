"""What the processes of a bench left, and the tables of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import median
from typing import Any

from bench import machine
from bench.interleaved import Ratio, Result

FILE = "end_to_end"
OURS = {"ours": None, "last third": (2 / 3, 1.0)}
"""The part of the layers that units are of."""
ARMS = ("all weights", "LoRA", *OURS, "floor")
OBJECTIVES = ("undial", "npo")
FLOORS = ("floor", "floor with the objective", "packed floor", "padded floor")
STEPS = 200
"""Of the package's default, to which the seconds of a whole run are extended."""


@dataclass(frozen=True)
class Setting:
    """What is run: how many records there are, and of each set in a step.

    The tokens in a pass of the localization are less than those of a step; the default is for a GPU.
    """

    model: str = "smollm2-135m"
    forget: int = 40
    retain: int = 160
    batch_size: int = 4
    steps: int = 9
    warm_up: int = 2
    fraction: float = 0.01
    rank: int = 8
    tokens_per_batch: int = 512
    seed: int = 0

    @property
    def epoch(self) -> int:
        """Steps of an epoch."""
        return self.forget // self.batch_size

    def steps_of(self, arm: str) -> int:
        """How many steps an arm runs: so many; ours as many in the second epoch, in which no original is asked."""
        return self.steps + (self.epoch if arm in OURS else 0)


@dataclass
class Run:
    """What one process left.

    Attributes:
        parts: name and seconds of each part, in their order: "load", "localize", "prepare", every "step" of the first
            epoch, and every "later step", "save"; of the floor those of ``FLOORS``.
        peaks: bytes, the highest resident set of the process until the end of each part.
    """

    parts: list[tuple[str, float]] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Bytes, the highest resident set of the process."""
        return max(self.peaks)

    def seconds(self, name: str) -> list[float]:
        """Of all parts of that name."""
        return [seconds for part, seconds in self.parts if part == name]

    @property
    def floors(self) -> list[str]:
        """Those of ``FLOORS`` that it ran."""
        return [name for name in FLOORS if self.seconds(name)]

    def timed(self, setting: Setting, name: str | None = None) -> list[float]:
        """Of the steps of the last rounds, without those that warm up: the same rounds of every arm and floor."""
        every = self.seconds(name) if name else self.seconds("later step") or self.seconds("step")
        return every[setting.warm_up - setting.steps :]

    def whole(self, setting: Setting, some: Callable[[list[float]], list[float]] = list) -> float:
        """Seconds of ``STEPS`` steps and all other parts but the loading, with steps of the length of the medians.

        ``some`` chooses of the steps those that count.
        """
        beside = sum(seconds for name, seconds in self.parts if name not in ("load", "step", "later step"))
        later = median(some(self.timed(setting)))
        first = median(some(self.seconds("step"))) if self.seconds("later step") else later
        return beside + setting.epoch * first + (STEPS - setting.epoch) * later

    def whole_over(self, other: Run, setting: Setting) -> Ratio:
        """The same over that of another, with a 95 % bootstrap interval over the steps of both."""

        def resampled(seed: int) -> float:
            def some(times: list[float]) -> list[float]:
                return Random(seed).choices(times, k=len(times))  # of both the same rounds

            return self.whole(setting, some) / other.whole(setting, some)

        drawn = sorted(map(resampled, range(1000)))
        return Ratio(self.whole(setting) / other.whole(setting), drawn[25], drawn[974])


def table(objective: str, arms: Mapping[str, Run], setting: Setting) -> str:
    """The arms of an objective, a line each."""
    lines = [f"{objective}: seconds of a step, of a run of {STEPS} steps; MB at most"]
    for arm, run in arms.items():
        for name in run.floors or ("step",):
            seconds = median(run.timed(setting, name if arm == "floor" else None))
            line = f"  {arm if name == 'step' else name:<26}{seconds:>8.3f}"
            if name == "step":
                line += f"{run.whole(setting):>10.1f}{run.peak / 1e6:>10.0f}"
                parts = ((part, sum(run.seconds(part))) for part in ("localize", "prepare", "save"))
                line += "  " + ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts)
            lines.append(line)
    return "\n".join(lines)


def load_runs(content: Mapping[str, Any]) -> dict[str, dict[str, Run]]:
    """The runs of every objective in a file of results; a localization is made once, with the first."""
    runs = {name: {arm: Run(**run) for arm, run in arms.items()} for name, arms in content["objectives"].items()}
    first = next(iter(runs.values()))
    for arms in runs.values():
        for own, localized in ((arms[arm], first[arm]) for arm in OURS):
            if own is not localized:
                names = [name for name, _ in localized.parts]
                own.parts.append(localized.parts[names.index("localize")])
                own.peaks.append(localized.peaks[names.index("localize")])
    return runs


HEAD = (
    "| arm | a step | / all weights | / LoRA | {steps} steps | / all weights | / LoRA | peak | / all weights | / LoRA |"
)


def section(content: Mapping[str, Any]) -> str:
    """The tables of docs/performance.md."""
    setting = Setting(**content["setting"])
    lines = [
        f"A whole unlearning of {setting.model}, {setting.forget} forget and {setting.retain} retain records of TOFU, "
        f"{setting.batch_size} + {setting.batch_size} a step, float32; "
        f"{machine.where(content['machine'])}. Localization, {STEPS} steps counted from the median of "
        f"{setting.steps - setting.warm_up} behind {setting.warm_up} that warm up, proof and checkpoint; MB of the "
        "highest resident set; ratios by round, 95 % intervals over the steps. Aims: .35 and .40 of all weights in "
        "time and memory, .80 of LoRA in time, a step at most 1.05 of the floor:\n",
    ]
    for objective, arms in load_runs(content).items():
        lines += [f"{HEAD.format(steps=STEPS).replace('arm', f'`{objective}`', 1)}", "| --- |" + " ---: |" * 9]
        others = [arms["all weights"], arms["LoRA"]]
        for arm, run in arms.items():
            for name in run.floors or (arm,):
                times = run.timed(setting, name if arm == "floor" else None)
                ratios = (by_rounds(times, other.timed(setting)) for other in others)
                cells = [name, f"{median(times):.2f} s", *map(short, ratios)]
                if arm == "floor":
                    cells += [""] * 6
                else:
                    whole = run.whole(setting)
                    cells += [f"{whole:,.0f} s", *(short(run.whole_over(other, setting)) for other in others)]
                    cells += [f"{run.peak / 1e6:,.0f} MB", *(f"{run.peak / other.peak:.2f}" for other in others)]
                lines.append(f"| {' | '.join(cells)} |")
        floors = arms["floor"]
        steps = arms["ours"].timed(setting)
        against = (f"{short(by_rounds(steps, floors.timed(setting, name)))} of the {name}" for name in floors.floors)
        lines.append(f"\nA step of ours takes {', '.join(against)}.\n")
    return "\n".join(lines)


def by_rounds(ours: Sequence[float], others: Sequence[float]) -> Ratio:
    """The ratio of two arms, round by round."""
    return Result("", {"ours": list(ours), "others": list(others)}).ratio("ours", "others")


def short(ratio: Ratio) -> str:
    """A ratio with its interval; that of a thing over itself without."""
    value = f"{ratio.value:.2f}"
    return value if ratio.low == ratio.high else f"{value} [{ratio.low:.2f}, {ratio.high:.2f}]"
