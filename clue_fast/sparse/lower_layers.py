"""What comes out of the layers below the lowest one that trains: computed once for each record, and kept.

Those layers do not change while a model trains, so that what they make of a record stays what it was in the first pass
over it. Later passes over records that are all known begin above: the layers below hand on what they are given, and the
last of them gives what was kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from clue_fast.internals import evaluation_mode, has_forward_hooks, is_compiled, own_parameters, unwrap
from clue_fast.sites.layers import find_layers

Batch: TypeAlias = "Mapping[str, Tensor]"
Record: TypeAlias = "tuple[int, ...]"
Around: TypeAlias = "Callable[[nn.Module, Batch, Sequence[Record] | None], AbstractContextManager[None]]"


class LowerLayers:
    """The layers of a model that do not train, up to the lowest one that does, and what they gave for each record.

    Nothing is kept, and every layer runs in every pass, where that might change anything: in a model with dropout; of
    inputs other than text padded on the right; where a layer below has hooks of its own, or is compiled, or sharded;
    and where a trial with the first record gives other bits than a whole pass, as where upper layers read more of the
    lower ones than their output.

    What is kept of a record was computed beside the others of its batch, so that a later loss agrees with that of a
    whole pass within the rounding of one batch and another.

    Args:
        model: whose layers they are.
        paths: of what trains in it.

    Attributes:
        layers: from the first on; empty where the first one trains, or where there is no list of layers.
        most_bytes: of what is kept; 0, from the start, keeps nothing. What has no room runs through all layers.
        forbidden: says that all layers must run now, such as while they are recorded; None never does.
    """

    def __init__(self, model: nn.Module, paths: Iterable[str]) -> None:
        self.most_bytes = 0
        self.forbidden: Callable[[], bool] | None = None
        self._kept: dict[Record, Tensor] = {}
        self.choose(model, paths)

    def choose(self, model: nn.Module, paths: Iterable[str]) -> None:
        """Turns to the layers below something else that trains."""
        self.layers = layers_below(model, paths)
        self.clear()

    def clear(self) -> None:
        """Forgets everything, since weights have changed."""
        self._kept.clear()
        self._bytes, self._as_tuple = 0, False
        self._separate: bool | None = None

    @property
    def bytes(self) -> int:
        """Bytes of what is kept."""
        return self._bytes

    def of_step(self, model: nn.Module) -> Around | None:
        """Returns what stands around the passes of a step, which is looked at once; None where all layers run.

        Args:
            model: that runs; perhaps wrapped.
        """
        if not self.layers or not self.most_bytes or self._separate is False:
            return None
        if (self.forbidden is not None and self.forbidden()) or not self.skippable(model):
            return None
        return self.around

    @contextmanager
    def around(self, model: nn.Module, batch: Batch, records: Sequence[Record] | None) -> Iterator[None]:
        """Stands around a forward pass, which skips these layers if all of its records are known.

        Args:
            model: that runs; perhaps wrapped.
            batch: its inputs, and labels.
            records: their tokens, without padding; None where they are no text that is padded on the right.
        """
        if records is None or set(batch) != {"input_ids", "attention_mask", "labels"} or self._separate is False:
            yield
            return
        if all(record in self._kept for record in records):
            if self._separate is None:
                self._separate = self._try(unwrap(model), batch, len(records[0]))
            if self._separate:
                with self._giving(self._padded(records, batch)):
                    yield
                return
        with self.watching() as outputs:
            yield
        self._keep(records, outputs)

    # Whether it changes nothing.

    def skippable(self, model: nn.Module) -> bool:
        """Whether a model may leave these layers out, whatever its records are: see the class.

        Args:
            model: that runs; perhaps wrapped.
        """
        if not self.layers or is_compiled(model):
            return False
        for module in (module for layer in self.layers for module in layer.modules()):
            if has_forward_hooks(module) or any(hasattr(p, "placements") for p in own_parameters(module).values()):
                return False
        return not (model.training and _drops_out(unwrap(model)))

    @torch.no_grad()
    def _try(self, model: nn.Module, batch: Batch, length: int) -> bool:
        """Whether a pass over the first record without these layers gives the bits that one with them does.

        Args:
            model: not wrapped.
            batch: of the pass.
            length: of the first record, in tokens.
        """
        inputs = {name: batch[name][:1, :length] for name in ("input_ids", "attention_mask")}
        with evaluation_mode(model):
            with self.watching() as outputs:
                whole = model(**inputs, use_cache=False).logits
            if len(outputs) != 1:
                return False
            try:
                with self._giving(outputs[0]):
                    part = model(**inputs, use_cache=False).logits
            except Exception:  # whatever a layer above misses
                return False
        return torch.equal(whole, part)

    # What is kept.

    def _keep(self, records: Sequence[Record], outputs: list[Tensor]) -> None:
        states = outputs[-1] if outputs else None
        if states is None or states.dim() != 3 or states.requires_grad or len(states) != len(records):
            self._separate = False  # the layer does not run, or gives something else
            return
        for record, of_record in zip(records, states, strict=True):
            own = of_record[: len(record)]
            if record not in self._kept and self._bytes + own.nbytes <= self.most_bytes:
                self._kept[record] = own.clone()
                self._bytes += own.nbytes

    def _padded(self, records: Sequence[Record], batch: Batch) -> Tensor:
        """What is kept of some records, [records, tokens, width], zeros behind the end of each."""
        own = [self._kept[record] for record in records]
        padded = own[0].new_zeros(*batch["input_ids"].shape, own[0].shape[-1])
        for row, states in zip(padded, own, strict=True):
            row[: len(states)] = states
        return padded

    # What the layers do in a pass.

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """What is seen of passes: the outputs of the last of these layers, for as long as the context lasts."""
        outputs: list[Tensor] = []

        def watch(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            self._as_tuple = isinstance(output, tuple)
            outputs.append(output[0] if self._as_tuple else output)

        handle = self.layers[-1].register_forward_hook(watch)
        try:
            yield outputs
        finally:
            handle.remove()

    @contextmanager
    def _giving(self, states: Tensor) -> Iterator[None]:
        """Has the last of these layers give some states, and the others what they are given."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs["hidden_states"]
            return (given,) if self._as_tuple else given

        def last(*_: Any, **__: Any) -> Any:
            return (states,) if self._as_tuple else states

        before = [vars(layer).get("forward") for layer in self.layers]
        for layer in self.layers:
            layer.forward = last if layer is self.layers[-1] else forward
        try:
            yield
        finally:
            for layer, own in zip(self.layers, before, strict=True):
                if own is None:
                    del layer.forward
                else:
                    layer.forward = own


def bytes_of(gigabytes: float) -> int:
    """How many bytes a memory of so many GB has."""
    return int(1e9 * gigabytes)


def layers_below(model: nn.Module, paths: Iterable[str]) -> list[nn.Module]:
    """The layers of a model below the lowest one that has any of these parameters or modules, from the first on.

    None where one of them is in no layer, or in those of another tower.
    """
    paths = list(paths)
    found = find_layers(model, paths)
    numbers = [number for path in paths if (number := found.number_of(path)) is not None]
    return list(found.modules[: min(numbers, default=0)])


def _drops_out(model: nn.Module) -> bool:
    """Whether anything in a model is set to zero at random while it trains: rates of modules, and their own."""
    for module in model.modules():
        if "Dropout" in type(module).__name__ and getattr(module, "p", 0) > 0:
            return True
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, int | float) and value > 0:
                return True
    return False
