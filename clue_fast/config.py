"""Settings of a run: defaults, checks, and how results.json has them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from clue_fast.deprecated import MASTERS
from clue_fast.errors import SettingError, UnknownNameError
from clue_fast.objectives import UNDIAL, Objective, get_objective
from clue_fast.selection import Selection
from clue_fast.sparse import LayerRate
from clue_fast.sparse.optimizer import layer_scale
from clue_fast.trainer.stages import Schedule, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_OBJECTIVE = UNDIAL(strength=20.0, retain_weight=10.0)
"""Has a fixed target, what the model would say if it did not know the answer, so that nothing runs away. With the rate
and the steps below it was chosen on data that no reported table is made of, see ``bench/defaults.py``."""

LAYER_LR = 0.2
RETAIN_RATIO = 4
WIDTH_RATE = 1.2
EPOCHS = 10.0
STEPS = 200


def default_learning_rate(model: PreTrainedModel) -> float:
    """Returns 1.2 / width: 0.006 at a width of 192, 0.0003 at 4096.

    Measured on models of a width of 128 to 192; that it falls with the width is the rule for Adam of Yang et al. 2022
    (arXiv 2203.03466). For a model of another kind it is a place to start from.
    """
    width: int = model.get_input_embeddings().weight.shape[-1]  # type: ignore[index, assignment]
    return WIDTH_RATE / width


def default_epochs(records: int, batch_size: int) -> float:
    """Returns 10, or as many epochs as 200 steps take: a small forget set needs more passes."""
    return max(EPOCHS, float(math.ceil(STEPS / math.ceil(records / max(1, batch_size)))))


def check_training(settings: Mapping[str, Any]) -> None:
    """Raises SettingError or UnknownNameError naming the first setting of a training that is out of range."""
    numbers = ["learning_rate", "epochs"]
    if isinstance(settings["layer_lr"], int | float):
        numbers.append("layer_lr")
    for name in numbers:
        if not 0.0 < settings[name] < math.inf:
            raise SettingError(f"{name} {settings[name]} is not a number above 0")
    for name in ("batch_size", "retain_ratio"):
        if not (settings[name] >= 1 and settings[name] == int(settings[name])):
            raise SettingError(f"{name} {settings[name]} is not a whole number above 0")
    target = settings["forget_target"]
    if target is not None and not 0.0 < target <= 1.0:
        raise SettingError(f"forget_target {target} is not a share above 0 and up to 1")
    if settings["master"] not in MASTERS:
        raise UnknownNameError("master", settings["master"], MASTERS)


def check_rates(layer_lr: LayerRate, selection: Selection) -> None:
    """Raises SettingError unless every layer with units to train has a rate."""
    layers = 1 + max(site.layer for site in selection.sites)
    try:
        for site in selection.sites:
            if len(selection.units(site)):
                layer_scale(layer_lr, site.layer, layers)
    except ValueError as error:
        raise SettingError(str(error)) from error


def described(
    every: Sequence[Stage],
    kept: Sequence[Stage],
    schedule: Schedule | None,
    settings: Mapping[str, Any],
    objective: Objective,
) -> dict[str, Any]:
    """The stages of a training as settings, in place of its epochs.

    Args:
        every: all stages that were asked for.
        kept: those that had units to train.
        schedule: the published one that they are of, or None.
        settings, objective: of the run; what the schedule has otherwise is listed as changed.
    """
    stages = [
        {"units": list(stage.units), "objective": get_objective(stage.objective).name, "epochs": stage.epochs}
        for stage in kept
    ]
    found: dict[str, Any] = {
        "stages": stages,
        "skipped_stages": [list(stage.units) for stage in every if stage not in kept],
        "epochs": sum(stage.epochs for stage in kept),
    }
    if schedule is not None:
        values = {**settings, **asdict(objective)}
        found["published"] = {
            "schedule": schedule.name,
            "source": schedule.source,
            "settings": {**schedule.settings, "epochs": [stage.epochs for stage in every]},
            "changed": [name for name, value in schedule.settings.items() if values[name] != value],
        }
    return found
