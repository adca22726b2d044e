"""Which units of which site are in which category, with their scores and where they came from.

A selection is made of scores by a budget: how many units of which pool, with scores made comparable between sites. A
category is two answers in one number: bit 0 says that a unit matters to the forget set, bit 1 that it matters to
the retain set. A selection is therefore two sets of units, and set operations act on both.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clue_fast.errors import BudgetError, FileFormatError, NonFiniteError, SelectionError, UnknownNameError
from clue_fast.files import load_tensors, save_tensors
from clue_fast.hub import find_file, push_folder
from clue_fast.reliability import Reliability
from clue_fast.sites import Site, check_sites, model_fingerprint

if TYPE_CHECKING:
    from clue_fast.statistics import Statistics

logger = logging.getLogger(__name__)

SCOPES = ("layer", "kind", "global")
DEFAULT_FRACTION = 0.01
Budget = float | Mapping[str, float]


def check_budget(
    fraction: Budget | None,
    *,
    count: int | Mapping[str, int] | None = None,
    threshold: float | None = None,
    scope: str = "layer",
) -> tuple[str, Any]:
    """Returns the name and value of the one budget given (default a fraction of 0.01). Raises BudgetError."""
    given = {"fraction": fraction, "count": count, "threshold": threshold}
    budgets = {name: value for name, value in given.items() if value is not None} or {"fraction": DEFAULT_FRACTION}
    if len(budgets) > 1:
        raise BudgetError(f"give one budget, not {' and '.join(budgets)}")
    if scope not in SCOPES:
        raise BudgetError(f"unknown scope {scope!r}; choose one of: {', '.join(SCOPES)}")
    ((budget, value),) = budgets.items()
    if isinstance(value, Mapping) and scope == "global":
        raise BudgetError("a budget by kind needs the scope 'layer' or 'kind', since 'global' ranks all kinds together")
    for number in value.values() if isinstance(value, Mapping) else [value]:
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise BudgetError(f"{budget} {number!r} is not a number")
        if budget == "fraction" and not 0.0 < number <= 1.0:
            raise BudgetError(f"fraction {number} is outside (0, 1]")
        if budget == "count" and not (number >= 1 and number == int(number)):
            raise BudgetError(f"count {number} is not a positive integer")
    return budget, value


def check_normalization(normalize: str | None) -> None:
    """Raises UnknownNameError if there is no such normalization."""
    if normalize is not None and normalize not in NORMALIZATIONS:
        raise UnknownNameError("normalization", normalize, NORMALIZATIONS)


def pools(sites: tuple[Site, ...], budget: str, value: Any, scope: str) -> list[tuple[list[Site], int]]:
    """Returns the sites that are ranked together, and how many units their budget is."""
    together: dict[Any, list[Site]] = {}
    for site in sites:
        together.setdefault({"layer": site, "kind": site.kind, "global": None}[scope], []).append(site)
    if isinstance(value, Mapping):
        unknown = set(value) - {site.kind for site in sites}
        if unknown:
            kinds = ", ".join(sorted({site.kind for site in sites}))
            raise BudgetError(f"no unit is of the kind {sorted(unknown)[0]!r}; the model has: {kinds}")
    found = []
    for pool in together.values():
        own = value.get(pool[0].kind, 0) if isinstance(value, Mapping) else value
        found.append((pool, _budgeted(budget, own, sum(site.width for site in pool)) if own else 0))
    return found


def _budgeted(budget: str, value: float, available: int) -> int:
    if budget == "fraction":
        return max(1, round(value * available))
    if value > available:
        raise BudgetError(f"count {value} is more than the {available} units there are")
    return int(value)


def top(values: Tensor, count: int) -> Tensor:
    """Marks the ``count`` highest values, [units] bool; of equal ones the first."""
    order = torch.sort(values, descending=True, stable=True).indices
    mask = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    mask[order[:count]] = True
    return mask


def _ranks(values: Tensor) -> Tensor:
    """Rank within the site as a share of its width, 1 for the highest; equal scores share their mean rank."""
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    upper = counts.cumsum(0).double()
    mean = upper - (counts - 1) / 2
    ranks: Tensor = mean[inverse] / len(values)
    return ranks.float()


def _standardized(values: Tensor) -> Tensor:
    wide = values.double()
    spread = wide.std(correction=0)
    return ((wide - wide.mean()) / spread.clamp_min(torch.finfo(torch.float64).tiny)).float()


NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {"rank": _ranks, "standardize": _standardized}

CATEGORIES = ("irrelevant", "forget", "retain", "conflict")
IRRELEVANT, FORGET, RETAIN, CONFLICT = range(4)

SELECTION_FILE = "selection.safetensors"

RELIABILITY = "reliability"
"""Where the source of a selection has it."""


class Scores(dict[Site, Tensor]):
    """One score per unit: ``{site: [width] float32}``, with the criterion that gave it and the model it belongs to."""

    def __init__(self, scores: Mapping[Site, Tensor], criterion: str, fingerprint: str) -> None:
        super().__init__(scores)
        self.criterion = criterion
        self.fingerprint = fingerprint

    def __repr__(self) -> str:
        return f"Scores({self.criterion}, {sum(map(len, self.values()))} units in {len(self)} sites)"


class Selection:
    """The categories of all units of a model.

    Args:
        sites: the sites of the model, in order.
        categories: per site [width] int8, the index into ``CATEGORIES``.
        scores: per site [width] float32.
        source: how it was made (criterion, budget, seed), anything JSON can hold.
        fingerprint: of the model it belongs to, see ``model_fingerprint``.

    Attributes:
        statistics: what it was made from, in this process; it is not saved.
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
        self.statistics: Statistics | None = None
        for site in self.sites:
            if self.categories[site].shape != (site.width,) or self.scores[site].shape != (site.width,):
                raise SelectionError(f"{site.name} has {site.width} units, its categories or scores have not")

    def units(self, site: Site) -> Tensor:
        """Returns the units of a site that are to be trained (forget and conflict), sorted, int64."""
        return torch.nonzero(self._selected(site)).flatten()

    def _selected(self, site: Site) -> Tensor:
        return (self.categories[site] & FORGET) != 0

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

    @property
    def shortfall(self) -> int:
        """How many units fewer than the budget asked for there were to select, see ``limit``."""
        return int(self.source.get("shortfall", 0))

    @property
    def categorized(self) -> bool:
        """Whether forget and conflict units were told apart, rather than ranked by one score, see ``select``."""
        return bool(self.source.get("categories", True))

    @property
    def reliability(self) -> Reliability | None:
        """Whether the labels of the data matter to it and halves of the data agree, where ``localize`` measured it."""
        values = self.source.get(RELIABILITY)
        return None if values is None else Reliability.from_dict(values)

    def _derived(self, **source: Any) -> dict[str, Any]:
        """The source of what is made from this selection; what the data say of this one does not hold for that."""
        return {**{key: value for key, value in self.source.items() if key != RELIABILITY}, **source}

    def restrict(self, *categories: str) -> Selection:
        """Returns this selection with the units of all other categories made irrelevant.

        Raises:
            UnknownNameError: no such category.
        """
        for name in categories:
            if name not in CATEGORIES:
                raise UnknownNameError("category", name, CATEGORIES)
        kept = torch.tensor([CATEGORIES.index(name) for name in categories], dtype=torch.int8, device="cpu")
        changed = {site: values * torch.isin(values, kept) for site, values in self.categories.items()}
        source = self._derived(restricted_to=list(categories))
        return Selection(self.sites, changed, self.scores, source, self.fingerprint)

    def limit(
        self,
        fraction: float | Mapping[str, float] | None = None,
        *,
        count: int | Mapping[str, int] | None = None,
        scope: str = "layer",
    ) -> Selection:
        """Returns this selection with only the top of its forget and conflict units, by score; the rest irrelevant.

        The budget is a share of all units, or a number, as in ``select``. Where there are fewer forget and conflict
        units than that, all of them stay, and the missing number is logged and kept as ``shortfall``.

        Raises:
            BudgetError: see ``check_budget``.
        """
        budget, value = check_budget(fraction, count=count, scope=scope)
        kept: dict[Site, Tensor] = {}
        shortfall = 0
        for sites, number in pools(self.sites, budget, value, scope):
            selected = torch.cat([self._selected(site) for site in sites])
            scores = torch.cat([self.scores[site] for site in sites])
            missing = max(0, number - int(selected.sum()))
            shortfall += missing
            best = top(scores.masked_fill(~selected, float("-inf")), number - missing)
            kept |= zip(sites, torch.split(best, [site.width for site in sites]), strict=True)
        changed = {
            site: torch.where(self._selected(site) & ~kept[site], IRRELEVANT, values)
            for site, values in self.categories.items()
        }
        if shortfall:
            logger.warning(
                "the budget asks for %d units more than are forget or conflict; they are not filled up", shortfall
            )
        source = self._derived(**{f"limit_{budget}": value, "limit_scope": scope, "shortfall": shortfall})
        return Selection(self.sites, changed, self.scores, source, self.fingerprint)

    def __or__(self, other: Selection) -> Selection:
        """What matters according to either; the scores are those of the left one."""
        return self._combine(other, "union", torch.bitwise_or)

    def __and__(self, other: Selection) -> Selection:
        """What matters according to both."""
        return self._combine(other, "intersection", torch.bitwise_and)

    def __sub__(self, other: Selection) -> Selection:
        """What matters according to this one and not to the other."""
        return self._combine(other, "difference", lambda mine, theirs: mine & ~theirs)

    def overlap(self, other: Selection) -> float:
        """Jaccard index of the units to train of two selections; 1 if neither has any."""
        both, either = len(self & other), len(self | other)
        return both / either if either else 1.0

    def _combine(self, other: Selection, name: str, operation: Callable[[Tensor, Tensor], Tensor]) -> Selection:
        if other.fingerprint != self.fingerprint or other.sites != self.sites:
            raise SelectionError(
                f"a selection of model {other.fingerprint} and one of {self.fingerprint} cannot be combined; "
                "make both on one model"
            )
        categories = {site: operation(values, other.categories[site]) for site, values in self.categories.items()}
        source = {"operation": name, "of": [self.source, other.source]}
        return Selection(self.sites, categories, self.scores, source, self.fingerprint)

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
        """Returns a table: units of every site by category, what is to be trained, and how far the data agree on it."""
        width = max((len(site.name) for site in self.sites), default=4)
        lines = [f"{'site':<{width}}  units  {'  '.join(f'{name:>10}' for name in CATEGORIES)}"]
        for site in self.sites:
            counts = torch.bincount(self.categories[site].long(), minlength=len(CATEGORIES)).tolist()
            lines.append(f"{site.name:<{width}}  {site.width:>5}  {'  '.join(f'{n:>10}' for n in counts)}")
        units = sum(site.width for site in self.sites)
        lines.append(f"{len(self)} of {units} units to train ({self.fraction:.2%}), {self.hash}")
        if self.shortfall:
            lines.append(f"{self.shortfall} units fewer than the budget asked for: there are no more to select")
        if self.reliability is not None:
            lines.append(self.reliability.sentence)
        return "\n".join(lines)

    def __repr__(self) -> str:
        units = sum(site.width for site in self.sites)
        criterion = self.source.get("criterion", self.source.get("operation", "given"))
        return f"Selection({len(self)} of {units} units in {len(self.sites)} sites, {criterion}, {self.hash})"

    def save_pretrained(
        self, folder: str | os.PathLike[str], *, push_to_hub: bool = False, repo_id: str | None = None, **options: Any
    ) -> None:
        """Writes the selection into a folder, which is made, under the name that ``from_pretrained`` looks for.

        Args:
            folder: may hold a checkpoint as well.
            push_to_hub: push it too, to ``repo_id`` or the name of the folder.
            repo_id, options: see ``push_to_hub``.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.save(Path(folder) / SELECTION_FILE)
        if push_to_hub:
            self.push_to_hub(repo_id or Path(folder).name, **options)

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike[str], model: nn.Module | None = None, **options: Any) -> Selection:
        """Reads the selection of a folder, such as that of ``unlearn``, or of a repository of the hub.

        Args:
            name: of the folder, or "owner/name".
            model: see ``load``.
            options: of ``huggingface_hub.hf_hub_download``, such as ``revision`` and ``token``.

        Raises:
            HubError, FileFormatError: there is none.
            SelectionError: see ``load``.
        """
        return cls.load(find_file(name, SELECTION_FILE, **options), model)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Selection",
        revision: str | None = None,
    ) -> str:
        """Pushes the selection to a repository of the hub, beside what is there; returns the address of the commit.

        Raises:
            HubError: there is no login, or the hub refuses.
        """

        def write(folder: Path) -> None:
            self.save(folder / SELECTION_FILE)

        return push_folder(repo_id, write, private=private, token=token, message=commit_message, revision=revision)

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
    fraction: float | Mapping[str, float] | None = None,
    *,
    count: int | Mapping[str, int] | None = None,
    threshold: float | None = None,
    scope: str = "layer",
    normalize: str | None = None,
) -> Selection:
    """Selects the top of a ranking as conflict units; all others are irrelevant.

    Give one budget; without any, ``fraction=0.3``.

    Args:
        scores: from ``score``; ties are broken by the lower site and unit.
        fraction: share of the units, in (0, 1]; at least one unit of every pool. A mapping gives each kind of unit
            its own, such as ``{"mlp": 0.05}``; kinds it does not name get none.
        count: number of units; also by kind.
        threshold: every unit with a score of at least this.
        scope: what is ranked together, and gets the budget: "layer" the units of a site, "kind" those of a kind
            in all layers, "global" all units of the model.
        normalize: makes scores comparable between sites before they are ranked or held against the threshold:
            "rank" replaces them by their rank within the site, as a share of its width; "standardize" by their
            distance from the mean of the site, in standard deviations.

    Raises:
        BudgetError: more than one budget, one outside its range, or an unknown scope.
        UnknownNameError: no such normalization.
        NonFiniteError: a score is NaN, named by its site.
    """
    budget, value = check_budget(fraction, count=count, threshold=threshold, scope=scope)
    chosen = _chosen(scores, budget, value, scope, normalize)
    categories = {site: mask.to(torch.int8) * CONFLICT for site, mask in chosen.items()}
    source = {"criterion": scores.criterion, "categories": False, **_source(budget, value, scope, normalize)}
    return Selection(tuple(scores), categories, scores, source, scores.fingerprint)


def categorize(
    forget: Scores,
    retain: Scores,
    fraction: float | Mapping[str, float] | None = None,
    *,
    count: int | Mapping[str, int] | None = None,
    threshold: float | None = None,
    scope: str = "layer",
    normalize: str | None = None,
) -> Selection:
    """Gives every unit one of the four categories, from how much it matters to each of two sets.

    A unit matters to a set if it is in the top of the ranking by its importance to that set; the top is set as in
    ``select``. It is a forget or retain unit if it matters to that set only, a conflict unit if to both, irrelevant
    if to neither. The score of a unit is its importance to the forget set.

    Args:
        forget, retain: importances, see ``clue_fast.criteria.importances``.
        fraction, count, threshold, scope, normalize: see ``select``.

    Raises:
        SelectionError: the two belong to different models.
        BudgetError, UnknownNameError, NonFiniteError: see ``select``.
    """
    if forget.fingerprint != retain.fingerprint or tuple(forget) != tuple(retain):
        raise SelectionError("the importances to forget and retain data belong to different models")
    budget, value = check_budget(fraction, count=count, threshold=threshold, scope=scope)
    to_forget, to_retain = (_chosen(scores, budget, value, scope, normalize) for scores in (forget, retain))
    categories = {
        site: to_forget[site].to(torch.int8) * FORGET + to_retain[site].to(torch.int8) * RETAIN for site in forget
    }
    source = {"criterion": forget.criterion, "categories": True, **_source(budget, value, scope, normalize)}
    return Selection(tuple(forget), categories, forget, source, forget.fingerprint)


def _chosen(scores: Scores, budget: str, value: Any, scope: str, normalize: str | None) -> dict[Site, Tensor]:
    """The units within a budget, [width] bool by site."""
    for site, values in scores.items():
        if torch.isnan(values).any():
            raise NonFiniteError(f"{site.path} has a score that is not a number; look at its weights and statistics")
    check_normalization(normalize)
    comparable = {site: NORMALIZATIONS[normalize](v) if normalize else v for site, v in scores.items()}
    if budget == "threshold":
        return {site: values >= value for site, values in comparable.items()}
    chosen: dict[Site, Tensor] = {}
    for sites, number in pools(tuple(scores), budget, value, scope):
        best = top(torch.cat([comparable[site] for site in sites]), number)
        chosen |= zip(sites, torch.split(best, [site.width for site in sites]), strict=True)
    return {site: chosen[site] for site in scores}


def _source(budget: str, value: Any, scope: str, normalize: str | None) -> dict[str, Any]:
    source = {budget: dict(value) if isinstance(value, Mapping) else value, "scope": scope}
    return source if normalize is None else {**source, "normalize": normalize}
