"""Selection: which units of which site are in which category, with their scores and where they came from."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.errors import BudgetError, FileFormatError, NonFiniteError, SelectionError
from clue_fast.files import load_tensors, save_tensors
from clue_fast.sites import Site, check_sites, model_fingerprint

CATEGORIES = ("irrelevant", "forget", "retain", "conflict")
IRRELEVANT, FORGET, RETAIN, CONFLICT = range(4)
SCOPES = ("layer", "global")


class Scores(dict[Site, Tensor]):
    """One score a unit: ``{site: [width] float32}``, with the criterion that gave it and the model it belongs to."""

    def __init__(self, scores: Mapping[Site, Tensor], criterion: str, fingerprint: str) -> None:
        super().__init__(scores)
        self.criterion = criterion
        self.fingerprint = fingerprint


class Selection:
    """The categories of all units of a model.

    Args:
        sites: the sites of the model, in order.
        categories: per site [width] int8, the index into ``CATEGORIES``.
        scores: per site [width] float32.
        source: how it was made (criterion, budget, seed), anything JSON can hold.
        fingerprint: of the model it belongs to, see ``model_fingerprint``.
    """

    def __init__(
        self,
        sites: tuple[Site, ...] | list[Site],
        categories: Mapping[Site, Tensor],
        scores: Mapping[Site, Tensor],
        source: dict[str, Any],
        fingerprint: str,
    ) -> None:
        self.sites = tuple(sites)
        self.categories = {site: categories[site].to("cpu", torch.int8) for site in self.sites}
        self.scores = {site: scores[site].to("cpu", torch.float32) for site in self.sites}
        self.source = dict(source)
        self.fingerprint = fingerprint
        for site in self.sites:
            if self.categories[site].shape != (site.width,) or self.scores[site].shape != (site.width,):
                raise SelectionError(f"{site.name} has {site.width} units, its categories or scores have not")

    def units(self, site: Site) -> Tensor:
        """Returns the units of a site that are to be trained (forget and conflict), sorted, int64."""
        category = self.categories[site]
        return torch.nonzero((category == FORGET) | (category == CONFLICT)).flatten()

    def slices(self) -> dict[tuple[str, int, int | None], Tensor]:
        """Returns what is to be trained of each parameter: ``{(parameter, dim, lead): index}``, int64, sorted.

        ``dim`` counts in the parameter, or in ``parameter[lead]`` where the parameter stacks those of several sites.
        """
        found: dict[tuple[str, int, int | None], list[Tensor]] = {}
        for site in self.sites:
            units = self.units(site)
            for part in site.parts if len(units) else ():
                found.setdefault((part.parameter, part.dim, part.lead), []).append(part.index(units))
        return {key: torch.cat(indices).sort().values for key, indices in found.items()}

    def __len__(self) -> int:
        return sum(len(self.units(site)) for site in self.sites)

    @property
    def fraction(self) -> float:
        """The share of all units that is to be trained."""
        return len(self) / max(1, sum(site.width for site in self.sites))

    @property
    def hash(self) -> str:
        """A hash of the categories alone, equal wherever and on however many devices they were found."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for site in self.sites:
            digest.update(site.name.encode() + self.categories[site].numpy().tobytes())
        return digest.hexdigest()[:16]

    def check(self, model: nn.Module) -> None:
        """Raises SelectionError unless this selection was made for the model, and is not empty."""
        fingerprint = model_fingerprint(model)
        if fingerprint != self.fingerprint:
            raise SelectionError(
                f"the selection belongs to the model {self.fingerprint}, this one is {fingerprint}; "
                "localize on this model"
            )
        check_sites(model, self.sites)
        if len(self) == 0:
            raise SelectionError("the selection holds no unit to train; raise the fraction or lower the threshold")

    def summary(self) -> str:
        """Returns a table: units and selected units of every site, by category."""
        width = max((len(site.name) for site in self.sites), default=4)
        lines = [f"{'site':<{width}}  units  {'  '.join(f'{name:>10}' for name in CATEGORIES)}"]
        for site in self.sites:
            counts = torch.bincount(self.categories[site].long(), minlength=len(CATEGORIES)).tolist()
            lines.append(f"{site.name:<{width}}  {site.width:>5}  {'  '.join(f'{n:>10}' for n in counts)}")
        lines.append(
            f"{len(self)} of {sum(s.width for s in self.sites)} units to train ({self.fraction:.2%}), {self.hash}"
        )
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Selection({len(self)} units of {len(self.sites)} sites, {self.source}, {self.hash})"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the selection to a safetensors file, atomically."""
        tensors = {f"categories.{i}": self.categories[site] for i, site in enumerate(self.sites)}
        tensors |= {f"scores.{i}": self.scores[site] for i, site in enumerate(self.sites)}
        header = {
            "sites": [site.as_dict() for site in self.sites],
            "source": self.source,
            "fingerprint": self.fingerprint,
        }
        save_tensors(path, "selection", tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> Selection:
        """Reads a selection, and checks that it belongs to the model if one is given.

        Raises:
            FileFormatError: the file is damaged or no selection.
            SelectionError: it belongs to another model.
        """
        tensors, header = load_tensors(path, "selection")
        try:
            sites = tuple(Site.from_dict(fields) for fields in header["sites"])
            selection = cls(
                sites,
                {site: tensors[f"categories.{i}"] for i, site in enumerate(sites)},
                {site: tensors[f"scores.{i}"] for i, site in enumerate(sites)},
                header["source"],
                header["fingerprint"],
            )
        except (KeyError, TypeError) as error:
            raise FileFormatError(f"{path} is no complete selection (missing {error}); make it again") from error
        if model is not None:
            selection.check(model)
        return selection


def select(
    scores: Scores,
    fraction: float | None = None,
    *,
    count: int | None = None,
    threshold: float | None = None,
    scope: str = "layer",
) -> Selection:
    """Selects the top of a ranking as conflict units; all others are irrelevant.

    Give one budget; without any, ``fraction=0.05``.

    Args:
        scores: from ``score``; ties are broken by the lower site and unit.
        fraction: share of the units, in (0, 1]; at least one unit of every layer (or of the model).
        count: number of units.
        threshold: every unit with a score of at least this.
        scope: "layer" gives every site the same share or count, "global" ranks all units of the model together.

    Raises:
        BudgetError: more than one budget, one outside its range, or an unknown scope.
        NonFiniteError: a score is NaN, named by its site.
    """
    budget, value = check_budget(fraction, count=count, threshold=threshold, scope=scope)
    for site, values in scores.items():
        if torch.isnan(values).any():
            raise NonFiniteError(f"{site.name} has a score that is not a number; look at its weights and statistics")
    if budget == "threshold":
        chosen = {site: values >= value for site, values in scores.items()}
    elif scope == "layer":
        chosen = {site: _top(values, _budgeted(budget, value, len(values))) for site, values in scores.items()}
    else:
        joined = torch.cat(list(scores.values()))
        top = _top(joined, _budgeted(budget, value, len(joined)))
        chosen = dict(zip(scores, torch.split(top, [site.width for site in scores]), strict=True))
    categories = {site: mask.to(torch.int8) * CONFLICT for site, mask in chosen.items()}
    source = {"criterion": scores.criterion, budget: value, "scope": scope}
    return Selection(tuple(scores), categories, scores, source, scores.fingerprint)


def check_budget(
    fraction: float | None, *, count: int | None = None, threshold: float | None = None, scope: str = "layer"
) -> tuple[str, float]:
    """Returns the name and value of the one budget given (default a fraction of 0.05). Raises BudgetError."""
    given = {"fraction": fraction, "count": count, "threshold": threshold}
    budgets = {name: value for name, value in given.items() if value is not None} or {"fraction": 0.05}
    if len(budgets) > 1:
        raise BudgetError(f"give one budget, not {' and '.join(budgets)}")
    if scope not in SCOPES:
        raise BudgetError(f"unknown scope {scope!r}; choose one of: {', '.join(SCOPES)}")
    ((budget, value),) = budgets.items()
    if budget == "fraction" and not 0.0 < value <= 1.0:
        raise BudgetError(f"fraction {value} is outside (0, 1]")
    if budget == "count" and not (value >= 1 and value == int(value)):
        raise BudgetError(f"count {value} is not a whole number above 0")
    return budget, value


def _budgeted(budget: str, value: float, available: int) -> int:
    if budget == "fraction":
        return max(1, round(value * available))
    if value > available:
        raise BudgetError(f"count {value} is more than the {available} units there are")
    return int(value)


def _top(values: Tensor, count: int) -> Tensor:
    order = torch.sort(values, descending=True, stable=True).indices
    mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    mask[order[:count]] = True
    return mask
