"""Attention: which modules have heads, in which order they call their projections, and how to make them run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.sites.heads import Measurement, NoHeadsError
from clue_fast.sites.mlp import Unmatched
from clue_fast.sites.projection import Projection, projection_of
from clue_fast.sites.rehearsal import required_arguments, sample
from clue_fast.sites.site import Site

FAMILIES = {"attention": Measurement.heads, "projection": Measurement.slices}
HEAD_SIZES = ("v_head_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim")
TOKENS = 4


def head_size(module: nn.Module) -> int | None:
    """Returns the channels of one head in the output projection's input, if a module says that it has heads."""
    sizes = (getattr(module, name, None) for name in HEAD_SIZES)
    return next((size for size in sizes if isinstance(size, int)), None)


def find_heads(model: nn.Module, families: Sequence[str] = ("attention",)) -> dict[str, list[Site] | Unmatched]:
    """Returns the attention heads of a model, by the path of the module that has them.

    Args:
        model: runs a few times on a few tokens, in evaluation mode and without gradients, and stays as it is.
        families: "attention" for whole heads: one site a module, or two where query heads share key/value heads;
            "projection" for their slices in single projections: four sites a module. Where there is none, why not.
    """
    projections = _projections(model)
    heads = {path: size for path, module in model.named_modules() if (size := head_size(module)) is not None}
    cores = [
        _Core(path, model.get_submodule(path), size, _decodes(model))
        for path, size in heads.items()
        if any(p.startswith(f"{path}.") for p in projections) and not any(p.startswith(f"{path}.") for p in heads)
    ]
    if not cores:
        return {}
    with _evaluating(model):
        failure = _watch(model, projections, cores, _text_run(model))
        for core in cores:
            inner = [p for path, p in projections.items() if path.startswith(f"{core.path}.")]
            if core.run is None and required_arguments(core.module) == 1:
                failure = _watch(model, projections, [core], _direct_run(core.module, inner[0].inputs)) or failure
        return {core.path: core.sites(model, families, failure) for core in cores}


def _projections(model: nn.Module) -> dict[str, Projection]:
    """The projections of a model by path, without those inside of adapters."""
    found = {path: p for path, module in model.named_modules() if (p := projection_of(module, path)) is not None}
    return {
        path: p for path, p in found.items() if not any(path[:end] in found for end, c in enumerate(path) if c == ".")
    }


@dataclass
class _Core:
    """An attention module, and what was seen of it.

    Attributes:
        path, module, size: where and what it is, and the channels of one of its heads.
        decodes: whether the model has an encoder and a decoder.
        run: makes it run on a number of rows, or None if it never ran.
        calls: the projections called inside it, in order, with what each was given.
        output: the projection that reads what the heads give.
    """

    path: str
    module: nn.Module
    size: int
    decodes: bool = False
    run: Callable[[int], None] | None = None
    calls: list[tuple[Projection, Tensor]] = field(default_factory=list)
    output: Projection | None = None

    def close(self) -> None:
        """At the end of the forward: the last projection is that of the output, unless it reads what others read."""
        last, given = self.calls[-1] if self.calls else (None, None)
        if given is not None and len(self.calls) > 1 and not any(_same(given, x) for _, x in self.calls[:-1]):
            self.output = last
            self.calls.pop()

    def sites(self, model: nn.Module, families: Sequence[str], failure: str | None) -> list[Site] | Unmatched:
        """The sites of the heads, or why there are none."""
        reason = failure or "token ids alone do not make it run"
        if self.run is not None and self.output is not None:
            inputs = list({p.path: p for p, _ in self.calls}.values())
            try:
                measured = Measurement(model, self.path, self.size, inputs, self.output, self.run)
                return [self._crossed(site) for family in families for site in FAMILIES[family](measured)]
            except NoHeadsError:
                return []
            except (ValueError, RuntimeError, TypeError, IndexError) as error:
                reason = str(error).splitlines()[0]
        reason = f"its heads could not be measured: {reason}"
        return Unmatched(self.path, type(self.module).__name__, reason, "attention")

    def _crossed(self, site: Site) -> Site:
        """The site, marked if it is of keys or values that are not of what the first projection was given."""
        given = {projection.path: x for projection, x in self.calls}
        others = site.structure == "rows" and not _same(given[site.output], self.calls[0][1])
        return replace(site, reads_encoder=True) if self.decodes and others else site


def _same(x: Tensor, y: Tensor) -> bool:
    return x is y or (x.data_ptr() == y.data_ptr() and x.shape == y.shape)


class _Watcher:
    """Follows one run: which projections are called inside which attention, and which comes after it."""

    def __init__(self, run: Callable[[int], None]) -> None:
        self.run = run
        self.inside: _Core | None = None
        self.waiting: _Core | None = None

    def enter(self, core: _Core) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if core.run is None:
                core.run, self.inside = self.run, core

        return hook

    def leave(self, core: _Core) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if self.inside is core:
                core.close()
                self.inside, self.waiting = None, core if core.output is None else None

        return hook

    def call(self, projection: Projection) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.inside is not None:
                self.inside.calls.append((projection, args[0] if args else next(iter(kwargs.values()))))
            elif self.waiting is not None:
                self.waiting.output, self.waiting = projection, None

        return hook


def _watch(
    model: nn.Module, projections: dict[str, Projection], cores: Sequence[_Core], run: Callable[[int], None]
) -> str | None:
    """Runs once, and lets the cores see what happens; returns why it failed, or None."""
    watcher = _Watcher(run)
    handles = []
    for core in cores:
        handles.append(core.module.register_forward_pre_hook(watcher.enter(core)))
        handles.append(core.module.register_forward_hook(watcher.leave(core)))
    for path, projection in projections.items():
        module = model.get_submodule(path)
        handles.append(module.register_forward_pre_hook(watcher.call(projection), with_kwargs=True))
    try:
        run(1)
    except Exception as error:  # any model may need anything; what it says is in the report
        for core in cores:
            core.run = None
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        for handle in handles:
            handle.remove()
    return None


def _text_run(model: nn.Module) -> Callable[[int], None]:
    body = getattr(model, "base_model", None)
    body = body if isinstance(body, nn.Module) else model
    device = next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
    decodes = _decodes(model)

    def run(rows: int) -> None:
        ids = torch.arange(3, 3 + TOKENS, device=device).expand(rows, TOKENS)
        body(input_ids=ids, **({"decoder_input_ids": ids} if decodes else {}))

    return run


def _decodes(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _direct_run(module: nn.Module, channels: int) -> Callable[[int], None]:
    like = next(module.parameters())

    def run(rows: int) -> None:
        module(sample(1, TOKENS, channels, seed=0).to(like.device, like.dtype).expand(rows, TOKENS, channels))

    return run


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    for module, _ in modes:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
