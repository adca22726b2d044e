"""The search for sites through a whole model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from clue_fast.errors import SelectionError, SiteError, UnknownNameError
from clue_fast.internals import unwrap
from clue_fast.sites.attention import find_heads, head_size
from clue_fast.sites.experts import find_experts
from clue_fast.sites.mlp import Unmatched, find_mlp, find_split_mlp, is_added
from clue_fast.sites.site import HEAD_FAMILIES, Site

KINDS = (
    "mlp",
    "expert",
    "attention",
    "attention_head",
    "attention_query",
    "attention_key_value",
    "projection",
    "projection_query",
    "projection_key",
    "projection_value",
    "projection_output",
)
DEFAULT_KINDS = ("mlp", "expert")


@dataclass(frozen=True)
class Survey:
    """What a search found.

    Attributes:
        sites: in the order of the modules.
        unmatched: what looks like a site but is none that is known.
        model: class of the model.
        kinds: that were looked for.
    """

    sites: tuple[Site, ...]
    unmatched: tuple[Unmatched, ...]
    model: str
    kinds: tuple[str, ...]

    def check(self) -> None:
        """Raises SiteError if no site was found."""
        if not self.sites:
            near = "".join(f"; {unmatched}" for unmatched in self.unmatched[:3])
            raise SiteError(
                f"{self.model} has no site of kind {', '.join(self.kinds)}: no module whose units are channels between "
                f"two projections (down(act(gate) · up), down(act(up)), stacked experts) or attention heads{near}"
            )

    def between(self, begin: float, end: float) -> Survey:
        """The sites of a part of the layers alone.

        Args:
            begin, end: of the part, as shares of the depth, in [0, 1]; rounded to whole layers.

        Raises:
            SiteError: no layer of the part has a site.
        """
        depth = 1 + max((site.layer for site in self.sites), default=-1)
        part = range(round(begin * depth), round(end * depth))
        chosen = tuple(site for site in self.sites if site.layer in part)
        if self.sites and not chosen:
            raise SiteError(
                f"{self.model} has {depth} layers with sites, and none of them lies between {begin:g} and {end:g} of "
                "the depth; give a larger part"
            )
        return replace(self, sites=chosen)


def find_sites(model: nn.Module, kinds: Iterable[str] = DEFAULT_KINDS) -> list[Site]:
    """Returns the sites of a model in the order of its modules.

    Args:
        model: stays as it is; paths are those in the model inside of torch.compile and DistributedDataParallel.
        kinds: which families of units to look for, of ``KINDS``: ``mlp``, ``expert``, and on request ``attention``,
            which stands for all kinds of heads, or ``projection``, for the slices of heads in single projections.

    Raises:
        SiteError: the model has no site of these kinds.
        UnknownNameError: no such kind.
    """
    found = survey(model, kinds)
    found.check()
    return list(found.sites)


def survey(model: nn.Module, kinds: Iterable[str] = DEFAULT_KINDS) -> Survey:
    """Searches a model. Raises UnknownNameError if there is no such kind."""
    wanted = tuple(kinds)
    for kind in wanted:
        if kind not in KINDS:
            raise UnknownNameError("kind of site", kind, KINDS)
    given, model = model, unwrap(model)
    sites: list[Site] = []
    unmatched: list[Unmatched] = []
    families = [family for family in HEAD_FAMILIES if any(kind.startswith(family) for kind in wanted)]
    heads = find_heads(model, families) if families else {}
    for path, module in model.named_modules():
        attention = heads.get(path, [])
        parent = model.get_submodule(path.rpartition(".")[0]) if path else None
        for found in (*_search(module, path, parent), *(attention if isinstance(attention, list) else [attention])):
            if isinstance(found, Unmatched):
                unmatched.append(found)
            else:
                sites.append(found)
    layers = {_layer(site.path) for site in sites if site.kind in DEFAULT_KINDS}
    # Recurrent layers and layers with an embedding of their own have the shapes of an MLP beside the one there is.
    unmatched = [u for u in unmatched if u.traced or not any(_holds(_layer(u.path), layer) for layer in layers)]

    def is_wanted(found: Site | Unmatched) -> bool:
        return any(found.kind == kind or found.kind.startswith(f"{kind}_") for kind in wanted)

    near = [found for found in unmatched if found.kind in wanted or found.kind not in DEFAULT_KINDS]
    return Survey(tuple(filter(is_wanted, sites)), tuple(near), type(given).__name__, wanted)


def _layer(path: str) -> str:
    """The layer that a module is in or is, as a path up to the last number; the module itself without one."""
    steps = path.split(".")
    last = max((place for place, step in enumerate(steps, start=1) if step.isdigit()), default=len(steps))
    return ".".join(steps[:last])


def _holds(outer: str, inner: str) -> bool:
    return outer in ("", inner) or inner.startswith(f"{outer}.")


def _search(module: nn.Module, path: str, parent: nn.Module | None) -> Iterator[Site | Unmatched]:
    """Yields what one module is, by its own parameters and children, and by what is done with what it returns."""
    experts = find_experts(module, path)
    yield from experts if isinstance(experts, list) else [experts] if experts is not None else []
    if head_size(module) is None:
        mlp = find_mlp(module, path) or find_split_mlp(module, path)
        if isinstance(mlp, Unmatched) or (mlp is not None and (parent is None or is_added(parent, module, mlp))):
            yield mlp


def check_sites(model: nn.Module, sites: Iterable[Site]) -> None:
    """Raises SelectionError unless the slices of every site are slices of a model's parameters."""
    parameters = dict(unwrap(model).named_parameters(remove_duplicate=False))
    for site in sites:
        for owned in site.slices:
            parameter = parameters.get(owned.parameter)
            if parameter is None:
                raise SelectionError(
                    f"{site.name} is part of {owned.parameter}, which {type(model).__name__} does not have"
                )
            shape = parameter.shape if owned.expert_index is None else parameter.shape[1:]
            end = int(owned.index(torch.tensor([site.width - 1], device="cpu")).max()) + 1
            if owned.dim >= len(shape) or end > shape[owned.dim] or (owned.expert_index or 0) >= parameter.shape[0]:
                raise SelectionError(
                    f"{site.name} has {site.width} units, {owned.parameter} is {list(parameter.shape)}; "
                    "they belong to different models"
                )
