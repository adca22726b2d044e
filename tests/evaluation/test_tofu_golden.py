"""The evaluation logs of the TOFU authors: from the losses and recalls in them follow their own figures, to the last
digit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

from clue_fast.evaluation import (
    forget_quality,
    mean_truth_ratio,
    model_utility,
    option_probability,
    truth_ratio,
)

FORGET = "eval_log_forget.json"
RETAIN, AUTHORS, WORLD = "eval_log.json", "eval_real_author_wo_options.json", "eval_real_world_wo_options.json"


@pytest.fixture(scope="module")
def logs(data_dir: Path) -> dict[str, dict[str, Any]]:
    folder = data_dir / "tofu_reference_logs"
    if not folder.is_dir():
        pytest.skip(f"no logs of the TOFU authors at {folder}")
    return {
        name: json.loads((folder / f"llama2-7b_{name}_wd0.01_eval_log_aggregated.json").read_text(encoding="utf-8"))
        for name in ("full", "retain90")
    }


def ratios_of(log: dict[str, Any], mean: str = "geometric", part: str = FORGET) -> list[float]:
    """Truth ratios on the forget set or another, from the losses in a log."""
    part = log[part]
    return [
        truth_ratio(loss, part["average_perturb_loss"][key], mean) for key, loss in part["avg_paraphrased_loss"].items()
    ]


def test_truth_ratios_are_the_logged_ones(logs: dict[str, dict[str, Any]]) -> None:
    for log in logs.values():
        assert ratios_of(log) == pytest.approx(list(log[FORGET]["truth_ratio"].values()), rel=1e-5)


def test_forget_quality(logs: dict[str, dict[str, Any]]) -> None:
    """From the losses, and from the truth ratios that are logged."""
    logged = (list(log[FORGET]["truth_ratio"].values()) for log in logs.values())
    for full, retrained in (map(ratios_of, logs.values()), logged):
        p, statistic = forget_quality(full, retrained)
        assert (f"{p:.6e}", f"{statistic:.6f}") == ("1.834066e-21", "0.396667")


@pytest.mark.parametrize(("name", "utility"), [("full", "0.585886"), ("retain90", "0.575240")])
def test_model_utility(logs: dict[str, dict[str, Any]], name: str, utility: str) -> None:
    nine = []
    for part in (RETAIN, AUTHORS, WORLD):
        log = logs[name][part]
        wrong = log["average_perturb_loss"]
        options = [option_probability(loss, wrong[key]) for key, loss in log["avg_gt_loss"].items()]
        plain = [math.exp(-loss) for loss in log["avg_gt_loss"].values()]
        nine += [
            fmean(plain if part == RETAIN else options),
            fmean(log["rougeL_recall"].values()),
            mean_truth_ratio(ratios_of(logs[name], "arithmetic", part), forgotten=False),
        ]
    assert f"{model_utility(nine):.6f}" == utility


@pytest.mark.parametrize(("name", "expected"), [("full", 0.516), ("retain90", 0.674)])
def test_truth_ratio_of_the_forget_set(logs: dict[str, dict[str, Any]], name: str, expected: float) -> None:
    assert mean_truth_ratio(ratios_of(logs[name]), forgotten=True) == pytest.approx(expected, abs=5e-4)
