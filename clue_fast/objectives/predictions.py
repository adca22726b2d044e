"""How a model is run over a batch, and what it says wherever it predicts a label.

Of a causal model the head runs at the answers alone: a pre-hook narrows what it reads. Where nothing comes behind the
head and it does not train, its logits are made a run of labels at a time, and what a function of each label's logits
needs for the backward pass is taken at once, so that no tensor as wide as the vocabulary is kept. What comes behind the
head, such as a soft cap or a scale, is the model's own: its logits then are those of its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from clue_fast.data import answer_mask, head_of, shift_labels
from clue_fast.errors import ObjectiveError
from clue_fast.internals import is_compiled
from clue_fast.ops.accumulators import wide
from clue_fast.sites import unwrap

Batch: TypeAlias = "Mapping[str, Tensor]"
"""Inputs of the model, and ``labels``: int64 [records, positions], or [records] for classification."""

OfLabel: TypeAlias = "Callable[..., Tensor]"
"""From the logits of some labels, [n, vocabulary] float32, and the labels, to one value each, [n]."""

RUN_BYTES = 32 * 2**20
LEAST_RUN = 128
"""Logits of so many bytes are made at a time, and of so many labels at the least: as fast as all at once."""

FEW_BYTES = {"cpu": 4 * 2**20}
"""A function of logits takes so many bytes of them at a time: what it makes of them stays in the cache."""


@dataclass(frozen=True)
class Head:
    """Makes logits of what the head of a model reads, or leaves logits as they are.

    Attributes:
        module: the head; None for logits.
        autocast: device, dtype and whether autocast is on where the model runs its head.
    """

    module: nn.Module | None = None
    autocast: tuple[str, torch.dtype, bool] | None = None

    def __call__(self, states: Tensor) -> Tensor:
        """Logits, float32 (float64 of states that are) [..., vocabulary], of states, [..., width]."""
        if self.module is None:
            return wide(states)
        assert self.autocast is not None
        device, dtype, enabled = self.autocast
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            logits: Tensor = self.module(states)
        return wide(logits)


@dataclass(frozen=True)
class Predictions:
    """What a model says where it predicts the labels of a batch of records.

    Attributes:
        states: [labels, width], what the head reads there, or logits; those of one record after those of another.
        labels: [labels] int64.
        counted: [records, positions] bool, which positions predict them.
        head: makes logits of states.
    """

    states: Tensor
    labels: Tensor
    counted: Tensor
    head: Head = Head()
    _found: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def logits(self) -> Tensor:
        """All logits at once, [labels, vocabulary] float32. ``by_label`` keeps none."""
        return self.head(self.states)

    @cached_property
    def losses(self) -> Tensor:
        """-log p of every label, [labels] float32."""
        return self.by_label(_label_losses, nll=True)

    @property
    def nll(self) -> Tensor:
        """The same without gradients: what ``losses`` or another function has left, or made for this."""
        if "nll" not in self._found:
            with torch.no_grad():
                self.by_label(_label_losses, nll=True)
        return self._found["nll"].detach()

    def by_label(self, function: OfLabel, *others: Tensor, nll: bool = False) -> Tensor:
        """A function of the logits of every label alone, [labels] float32, without keeping logits.

        Args:
            function: called with logits, labels and the logits of each of the others, of some labels at a time; must
                give a value to each from its own logits, and may be called under any grad mode.
            others: states of the same labels from elsewhere, such as of the original model; they have no gradient.
            nll: from the same logits ``nll`` is made too.

        Raises:
            ObjectiveError: the others are not what the head reads, or logits where these are.
        """
        for other in others:
            if other.shape != self.states.shape:
                raise ObjectiveError(
                    f"the original model said {list(other.shape)} of labels of which the model says "
                    f"{list(self.states.shape)}; it ran in another way, wrap or compile the model before it trains"
                )
        if self.head.module is None:
            values = function(self.logits, self.labels, *(wide(other) for other in others))
            if nll:
                self._found["nll"] = values if function is _label_losses else _label_losses(self.logits, self.labels)
        else:
            arguments = self.states, self.labels, self.head, function, others, nll
            values, found = _ByLabel.apply(*arguments)  # type: ignore[no-untyped-call]
            if nll:
                self._found["nll"] = found
        return values

    @property
    def tokens(self) -> Tensor:
        """How many labels a record has, [records] int64."""
        return self.counted.sum(-1)

    def total(self, values: Tensor) -> Tensor:
        """Sums one value a label over each record, [labels] -> [records] float32."""
        zeros = torch.zeros(self.counted.shape, dtype=values.dtype, device=values.device)
        return zeros.masked_scatter(self.counted, values).sum(-1)

    def mean(self, values: Tensor) -> Tensor:
        """Averages one value a label over each record; 0 for a record without labels."""
        return self.total(values) / self.tokens.clamp(min=1)


def _wide_dtype(states: Tensor) -> torch.dtype:
    return torch.float64 if states.dtype == torch.float64 else torch.float32


def _label_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


class _ByLabel(torch.autograd.Function):
    """A function of each label's logits, a run of labels after another, and at once its gradient by the states.

    A value depends on its own states alone, so that the gradient of the sum holds that of every value; the backward
    pass multiplies each by what comes from above.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, labels: Tensor, head: Head, function: OfLabel, others: tuple[Tensor, ...], nll: bool
    ) -> tuple[Tensor, Tensor]:
        differentiated = ctx.needs_input_grad[0]
        grads = torch.empty_like(states) if differentiated else None
        values = states.new_empty(len(labels), dtype=_wide_dtype(states))
        losses = torch.empty_like(values) if nll else values.new_empty(0)
        for run in _runs(len(states), head, RUN_BYTES, LEAST_RUN):
            beside = [head(other[run]) for other in others]
            with torch.set_grad_enabled(differentiated):
                own = states[run].detach().requires_grad_(differentiated)
                logits = head(own)
            slopes = torch.empty_like(logits) if differentiated else None
            for few in _runs(len(own), head, FEW_BYTES.get(states.device.type, RUN_BYTES), 1):
                of_few = labels[run][few]
                with torch.set_grad_enabled(differentiated):
                    some = logits[few].detach().requires_grad_(differentiated)
                    found = function(some, of_few, *(other[few] for other in beside))
                    if slopes is not None:  # not by autograd.grad, under which hooks of modules ask what it cannot say
                        torch.autograd.backward(found.sum())
                        assert some.grad is not None
                        slopes[few] = some.grad
                values[run][few] = found.detach()
                if nll:
                    likely = found if function is _label_losses else _label_losses(some, of_few)
                    losses[run][few] = likely.detach()
            if grads is not None:
                torch.autograd.backward(logits, slopes)
                assert own.grad is not None
                grads[run] = own.grad
        ctx.save_for_backward(grads)
        ctx.mark_non_differentiable(losses)
        return values, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (grads,) = ctx.saved_tensors
        return (grad[:, None] * grads).to(grads.dtype), None, None, None, None, None


def _runs(labels: int, head: Head, most_bytes: int, least: int) -> Iterator[slice]:
    """Some labels after others, at least so many, and of no more logits than so many bytes where that is more."""
    weight = getattr(head.module, "weight", None)
    vocabulary = weight.shape[0] if isinstance(weight, Tensor) else 2**16
    size = max(least, most_bytes // (4 * vocabulary))
    return (slice(start, min(start + size, labels)) for start in range(0, labels, size))


def predict_in_one_pass(model: nn.Module, batch: Batch) -> Predictions:
    """Runs one batch, of whatever inputs the model takes, and returns its predictions. Raises as ``predict``."""
    return predictions_by_set(model, batch, {"": len(batch["labels"])})[""]


def predictions_by_set(
    model: nn.Module, batch: Batch, sizes: Mapping[str, int], inputs: Batch | None = None
) -> dict[str, Predictions]:
    """Those for sets of records, of so many each, that stand in one batch, one behind another.

    ``inputs`` are run in its place, which have the same labels in the same order.
    """
    head = head_of(model, batch["labels"])
    states, made = _states(model, batch if inputs is None else inputs, head)
    masks, answers = (torch.split(tensor, list(sizes.values())) for tensor in _answers(batch["labels"], head))
    chosen = [own[mask] for own, mask in zip(answers, masks, strict=True)]
    parts = zip(sizes, torch.split(states, [len(own) for own in chosen]), chosen, masks, strict=True)
    return {name: Predictions(own, labels, mask, made) for name, own, labels, mask in parts}


def _answers(labels: Tensor, head: str) -> tuple[Tensor, Tensor]:
    """Which positions predict a label, and the label that each would, both [records, positions]."""
    labels = labels[:, None] if head == "classification" else labels
    return answer_mask(labels, head), shift_labels(labels, head)


# One pass.

_bare: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Whether what a model returns is what its head gave, for models that have been run.

A wrapped model and the one inside it are two: what is learned of the one in a pass that not every process makes must
not decide how often the other is run, for whose passes all processes wait.
"""


def _states(model: nn.Module, batch: Batch, head: str) -> tuple[Tensor, Head]:
    """What the head reads where labels are predicted, [labels, width], and the head; or logits, and no head."""
    labels = batch["labels"]
    counted = answer_mask(labels, head)
    module = _separate_head(model) if head == "causal" else None
    if module is None:
        logits = getattr(run(model, batch), "logits", None)
    else:
        frozen = not any(p.requires_grad for p in module.parameters())
        apart = frozen and _bare.get(model, False)
        with narrowed(module, counted, keep=not apart) as seen:
            logits = getattr(run(model, batch), "logits", None)
        if seen.states is not None and logits is not None:
            _bare[model] = logits is seen.logits
            if frozen and _bare[model]:
                return seen.states, Head(module, seen.autocast)
            return _states(model, batch, head) if apart else (wide(logits[0]), Head())
    if logits is None:
        raise ObjectiveError(f"{type(unwrap(model)).__name__} returns no logits; objectives need a head with labels")
    if head == "classification":
        logits, labels = logits[:, None], labels[:, None]
    if logits.shape[:2] != labels.shape:
        raise ObjectiveError(
            f"{type(unwrap(model)).__name__} gives logits at {list(logits.shape[:2])} positions for "
            f"{list(labels.shape)} labels; expand image or prefix tokens in input_ids first"
        )
    return wide(logits[answer_mask(labels, head)]), Head()


def _separate_head(model: nn.Module) -> nn.Module | None:
    """The head of a causal model, where it can be told what to read: it is not sharded, and nothing is compiled."""
    get: Any = getattr(unwrap(model), "get_output_embeddings", None)
    try:
        module = None if get is None else get()
    except (AttributeError, NotImplementedError):
        return None
    if not isinstance(module, nn.Module) or any(hasattr(p, "placements") for p in module.parameters()):
        return None
    return None if is_compiled(model) else module


@dataclass
class Seen:
    """What the head of a model was given and gave in a pass, [labels, width] and [1, labels, vocabulary]."""

    states: Tensor | None = None
    logits: Tensor | None = None
    autocast: tuple[str, torch.dtype, bool] | None = None


@contextmanager
def narrowed(module: nn.Module, counted: Tensor, keep: bool = True) -> Iterator[Seen]:
    """Has the head of a model read the positions that count alone, in whose place [1, labels, width] comes.

    Args:
        module: the head.
        counted: [records, positions] bool. A head that reads something else reads all of it.
        keep: otherwise it reads nothing at all, [1, 0, width], and its states are there to make logits of.
    """
    seen = Seen()

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args else None
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != counted.shape:
            return None
        kind = hidden.device.type
        seen.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        seen.states = hidden[counted]
        return (seen.states[None] if keep else hidden[:1, :0], *args[1:])

    def after(_: nn.Module, __: tuple[Any, ...], logits: Any) -> None:
        seen.logits = logits

    handles = module.register_forward_pre_hook(before), module.register_forward_hook(after)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """Runs the model on a batch, without its labels, and returns its output."""
    inputs: dict[str, Any] = {name: tensor for name, tensor in batch.items() if name != "labels"}
    head = head_of(model, batch["labels"])
    if head == "seq2seq" and "decoder_input_ids" not in inputs:
        inner: Any = unwrap(model)
        inputs["decoder_input_ids"] = inner.prepare_decoder_input_ids_from_labels(batch["labels"])
    if head in ("causal", "seq2seq"):
        # Caching keys is of no use here, and not compatible with gradient checkpointing.
        options["use_cache"] = False
    return model(**inputs, **options)
