"""patch and unpatch: recording for one instance of a model, which can be undone without a trace."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clue_fast.data import has_head, head_of
from clue_fast.errors import PatchError, SettingError, SiteError, UnknownNameError
from clue_fast.internals import is_replica
from clue_fast.ops import CLOSED_FORMS, FIELDS, GRADIENT_FIELDS, fields_of
from clue_fast.ops import backend as backends
from clue_fast.recording.recorder import ON_NONFINITE, Recorder
from clue_fast.recording.replacement import Hook, Installation, Override, install
from clue_fast.recording.report import Report, SiteReport
from clue_fast.recording.tokens import (
    ANSWERS,
    ATTENDED,
    DECODER,
    ENCODER,
    TEXT,
    Batch,
    Images,
    entry,
    find_towers,
    image_token,
    tower_of,
)
from clue_fast.selection import Scores
from clue_fast.sites import DEFAULT_KINDS, Survey, device_of, model_fingerprint, survey, unwrap
from clue_fast.statistics import DEFAULT_GROUPS, Statistics

TOKENS = (ANSWERS, ATTENDED)
# What a pass is given when it reads only new tokens, under the names of transformers from 5.24 on and before.
CACHES = ("cache", "past_key_values", "cache_params")
_PATCHED = "_clue_fast_patched"


class Patched:
    """A patched model: records statistics, and can be undone. Also a context manager that undoes it at its end.

    Attributes:
        model: the model as it was given.
        sites: what is recorded.
        unmatched: what looks like a site but is not recorded, with the reason.
    """

    scorer: ClassVar[Callable[..., Scores] | None] = None
    """From statistics and the name of a criterion to scores; ``clue_fast.criteria`` sets it, which knows them."""

    def __init__(self, model: nn.Module, found: Survey, backend: str | None, strict: bool) -> None:
        self.model = model
        self.sites = found.sites
        self.unmatched = found.unmatched
        self._entry = entry(model)
        statistics = Statistics(self.sites, model_fingerprint(model), device=device_of(model))
        self._recorder = Recorder(statistics, backend)
        self._image_token = image_token(self._entry)
        self._head = head_of(self._entry) if has_head(self._entry) else None
        model = unwrap(model)
        paths = {module: path for path, module in model.named_modules()}
        towers = {paths[module]: name for module, name in find_towers(self._entry).items()}
        tower = {s.name: ENCODER if s.reads_encoder else tower_of(s.path, towers) for s in self.sites}
        self._arguments = list(inspect.signature(type(self._entry).forward).parameters)[1:]
        self._reads_text = TEXT in tower.values()
        self._installation: Installation | None = install(model, self.sites, self._recorder, tower, strict)
        self._watch_passes({name: model.get_submodule(path) for path, name in towers.items()})

    @property
    def statistics(self) -> Statistics:
        """The statistics recorded so far."""
        return self._recorder.statistics

    def accumulators(self) -> list[Any]:
        """Returns what holds the numbers recorded so far; a copy of the model would copy it."""
        return [self._recorder.statistics, self._recorder.invalid_tokens]

    @contextmanager
    def record(
        self,
        group: str,
        *,
        tokens: str | None = None,
        gradients: bool = False,
        statistics: Collection[str] | None = None,
        score: str | None = None,
        on_nonfinite: str = "raise",
    ) -> Iterator[Statistics]:
        """Counts the tokens of every forward pass inside the block into a group.

        Padding (``attention_mask`` 0) never counts. A batch may bring its own ``token_group``: [batch, tokens] int8
        says it for every token (0 = not counted, 1 = forget, 2 = retain, and so on in the order of
        ``statistics.groups``), [batch] for every row. A sequence-to-sequence model has tokens of two kinds:
        ``token_group`` is of the encoder's, ``decoder_token_group`` of the decoder's, which otherwise follow their
        rows. So do the tokens of images. Tokens of an encoder or an image are never answers, and count with their row.

        Args:
            group: name of the group, such as "forget"; a new name makes a new group.
            tokens: "answers" counts only where a label other than -100 is predicted, which for a causal model is one
                position before the token with that label, see ``clue_fast.data.collator``; "attended" all but padding.
                Default is answers where a batch has a label for every token, and attended where it has not.
            gradients: also record a·∂L/∂a in backward passes.
            statistics: names of those to take, such as ("mean", "variance"), see ``ops.STATISTICS``:
                fewer cost less. Default is those that the score is made of, or, without one, all. Reading others
                afterwards raises PatchError.
            score: a criterion that is a closed form of the statistics, one of ``ops.CRITERIA_OPS``: every pass also
                writes the scores of the units, in the launches that add to their statistics, and ``scores`` only looks
                at them. With one that reads a·∂L/∂a, run backward inside the block.
            on_nonfinite: what NaN or infinity in an activation leads to. "raise": an error at the end of the block;
                "skip_batch": the batch is left out, ``statistics.skipped`` counts them; "count": the token is left
                out at that site, ``statistics.nonfinite`` counts them.

        Raises:
            PatchError: inside another recording, or after ``unpatch``; of a forward pass, if its tokens are not clear;
                a score, or statistics, that read gradients where this block, or an earlier one, records none, or
                statistics that an earlier one left out.
            SettingError: the score is no closed form.
            UnknownNameError: no such choice of tokens, statistics or on_nonfinite.
            NonFiniteError: at the end, if an activation or gradient was NaN or infinite, naming the site.
        """
        recorder = self._recorder
        if self._installation is None:
            raise PatchError("the model was unpatched; patch it again to record")
        if recorder.recording:
            raise PatchError("already recording; leave the first block before the second begins")
        if tokens is not None and tokens not in TOKENS:
            raise UnknownNameError("choice of tokens", tokens, TOKENS)
        if on_nonfinite not in ON_NONFINITE:
            raise UnknownNameError("treatment of what is not finite", on_nonfinite, ON_NONFINITE)
        if score is not None:
            self._check_score(score, gradients)
        fields = _fields_to_take(statistics, score, gradients)
        recorder.default_group = recorder.statistics.group_index(group)
        if gradients:
            recorder.statistics.allocate_gradients()
        recorder.statistics.keep_scores(score, recorder.backend)
        recorder.recording, recorder.gradients = True, gradients
        recorder.take(fields)
        recorder.tokens, recorder.score, recorder.on_nonfinite = tokens, score, on_nonfinite
        recorder.commit()
        try:
            yield recorder.statistics
        finally:
            recorder.finish()
        recorder.check()
        recorder.statistics.check_finite()

    @property
    def is_recording(self) -> bool:
        """Whether a recording block is open."""
        return self._recorder.recording

    def forward_layers(self, **batch: Any) -> Any:
        """Runs the model without its language-model head, for recording: the same statistics for less."""
        model = self._entry
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            return model(**batch)
        args, kwargs = self._begin(model, (), batch)
        try:
            return getattr(model, "base_model", model)(*args, **kwargs)
        finally:
            self._end()

    def _check_score(self, score: str, gradients: bool) -> None:
        if score not in CLOSED_FORMS:
            raise SettingError(
                f"criterion {score!r} is no closed form of what a forward pass adds up; score by one of "
                f"{', '.join(CLOSED_FORMS)}, or record without score= and call localize(criterion={score!r})"
            )
        if not CLOSED_FORMS[score].gradients:
            return
        if not gradients:
            raise PatchError(f"score {score!r} reads a·∂L/∂a, which this block does not record; add gradients=True")
        statistics = self._recorder.statistics
        before = [name for name, row in zip(DEFAULT_GROUPS, statistics.count, strict=False) if bool(row.any())]
        if before and statistics.gradient_values is None:
            raise PatchError(
                f"score {score!r} reads a·∂L/∂a, and group {before[0]!r} was recorded without; reset the statistics, "
                "and record it with gradients=True"
            )

    def scores(self, criterion: str | None = None) -> Scores:
        """Scores every unit of every site from what was recorded so far, also inside a recording block.

        Recording with ``score=`` has written them already, after any pass; they are computed once where a batch was
        skipped, or the statistics were merged or reset, since. Any other criterion takes one launch.

        Args:
            criterion: one that needs activations, or gradients where they are recorded, see
                ``clue_fast.criteria.CRITERIA``; default that of ``score=``, or else ``difference``.

        Returns:
            ``{site: [width] float32}``.

        Raises:
            PatchError: no token of forget or retain was recorded yet, or not with what the criterion needs.
            UnknownNameError: no such criterion.
            NonFiniteError: an activation or gradient was NaN or infinite, naming the site.
        """
        if Patched.scorer is None:
            raise PatchError("no criteria are loaded to score by; import clue_fast.criteria first")
        criterion = criterion or self._recorder.score or "difference"
        return Patched.scorer(self._recorder.merged(), criterion, backend=self._recorder.backend)

    def report(self) -> Report:
        """Returns what runs at every site, and how many tokens were counted."""
        statistics = self.statistics
        entries = []
        for installed in self._installation.entries if self._installation else []:
            point, device = installed.point, installed.device
            choice = backends.choose(installed.operator, device, self._recorder.backend)
            summed = "norms summed in float64" if point.site.channels > 1 else ""
            counts = statistics.count[:, point.numbers].sum(1).tolist()
            entries.append(
                SiteReport(
                    path=point.site.path,
                    kind=point.site.kind,
                    width=point.site.width,
                    experts=len(point.sites),
                    operator=installed.operator,
                    fused=installed.fused,
                    backend=choice.name,
                    reason="; ".join(part for part in (installed.note, summed, choice.reason) if part),
                    launches=point.launches,
                    tokens=dict(zip(statistics.groups, counts, strict=True)),
                    nonfinite=int(statistics.nonfinite[:, point.numbers].sum()),
                )
            )
        for unmatched in self.unmatched:
            reason = f"not recorded: {unmatched.reason}"
            entries.append(SiteReport(unmatched.path, "unknown", 0, 1, "none", False, "none", reason, 0, {}, 0))
        return Report(type(self._entry).__name__, statistics.fingerprint, entries, int(statistics.skipped))

    def __repr__(self) -> str:
        state = "recording" if self._recorder.recording else "patched" if self._installation else "unpatched"
        return f"Patched({type(self._entry).__name__}, {len(self.sites)} sites, {state})"

    def unpatch(self) -> None:
        """Gives every module its class back; the model is then what it was before.

        Raises:
            PatchError: called twice, or while recording, or something was changed since that must be undone first;
                the model then stays patched, and usable.
        """
        if self._installation is None:
            raise PatchError("the model is not patched (any more)")
        if self._recorder.recording:
            raise PatchError("unpatch after the recording block, not inside it")
        self._installation.undo()
        self._installation = None
        self._entry.__dict__.pop(_PATCHED, None)

    def __enter__(self) -> Patched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._installation is not None:
            self._recorder.recording = False
            self.unpatch()

    def _watch_passes(self, towers: dict[str, nn.Module]) -> None:
        """Has every pass of the model, and of its encoder and decoder, say which tokens it is about."""
        assert self._installation is not None
        changes = self._installation.changes
        model = self._entry
        changes.append(Hook(model.register_forward_pre_hook(self._begin, with_kwargs=True)))
        changes.append(Hook(model.register_forward_hook(self._end, always_call=True)))
        for name in (ENCODER, DECODER):
            if name in towers:
                hook = _AssignTower(self, name)
                changes.append(Hook(towers[name].register_forward_pre_hook(hook, with_kwargs=True)))
        if callable(getattr(model, "generate", None)):
            override = Override(model, "generate", _Generate(self, model.__dict__.get("generate")))
            override.apply()
            changes.append(override)

    def _begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the model: takes from the batch which tokens count."""
        given = kwargs.pop("token_group", None)
        decoder_given = kwargs.pop("decoder_token_group", None)
        recorder = self._recorder
        if recorder.recording:
            if is_replica(model):
                raise PatchError("replicas of DataParallel cannot record; use one device, or DistributedDataParallel")
            if self._installation is not None and not torch.compiler.is_compiling():
                self._installation.check()
            inputs = dict(zip(self._arguments, args, strict=False)) | kwargs
            batch = self._batch(inputs, given, decoder_given)
            recorder.begin(batch)
            if self._reads_text:
                batch.assign(TEXT, inputs, self._seen(TEXT, inputs))
        return args, kwargs

    def _end(self, *_: Any) -> None:
        """Forward hook of the model."""
        self._recorder.in_flight = False

    def _batch(self, inputs: dict[str, Any], given: Tensor | None = None, decoder: Tensor | None = None) -> Batch:
        recorder = self._recorder
        groups, labels = len(recorder.statistics.groups), inputs.get("labels")
        images = Images.among(inputs, self._image_token)
        return Batch(recorder.default_group, groups, recorder.tokens, self._head, labels, images, given, decoder)

    def _seen(self, tower: str, inputs: dict[str, Any]) -> int:
        """How many positions ``generate`` has fed to a tower before, where it feeds all of them again."""
        recorder = self._recorder
        if recorder.generating is None or any(inputs.get(name) is not None for name in CACHES):
            return 0
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        seen = recorder.generating.get(tower, 0)
        recorder.generating[tower] = 0 if tokens is None else tokens.shape[1]
        return seen


def _fields_to_take(statistics: Collection[str] | None, score: str | None, gradients: bool) -> frozenset[str] | None:
    """The sums that a recording adds to, or None for all."""
    if statistics is None and score is None:
        return None
    fields = fields_of(statistics or ())
    of_gradients = fields.intersection(GRADIENT_FIELDS)
    if of_gradients and not gradients:
        raise PatchError(f"statistics {sorted(statistics or ())} read a·∂L/∂a; add gradients=True")
    if score is not None:
        form = CLOSED_FORMS[score]
        fields |= set(form.fields)
        if form.gradients and not fields.intersection(FIELDS):
            fields |= {"magnitude_sum"}  # the forward writes scores too, since it changes the number of tokens
    if statistics is None and gradients and not fields.intersection(GRADIENT_FIELDS):
        fields |= set(GRADIENT_FIELDS)
    return fields


class _AssignTower:
    """Forward pre-hook of an encoder or decoder."""

    def __init__(self, patched: Patched, tower: str) -> None:
        self.patched, self.tower = patched, tower

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        patched, recorder = self.patched, self.patched._recorder
        if not recorder.recording:
            return
        inputs = dict(zip(("input_ids",), args, strict=False)) | kwargs
        if recorder.batch is None or not recorder.in_flight:  # generate runs the encoder by itself
            recorder.begin(patched._batch({}))
        assert recorder.batch is not None
        recorder.batch.assign(self.tower, inputs, patched._seen(self.tower, inputs))


class _Generate:
    """``generate`` of the model, during which every token counts once."""

    def __init__(self, patched: Patched, own: Callable[..., Any] | None) -> None:
        self.patched, self.own = patched, own

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, recorder = self.patched._entry, self.patched._recorder
        recorder.generating = {}
        try:
            if self.own is not None:
                return self.own(*args, **kwargs)
            return type(model).generate(model, *args, **kwargs)  # type: ignore[attr-defined]
        finally:
            recorder.generating = None


def patch(
    model: nn.Module,
    *,
    kinds: Iterable[str] = DEFAULT_KINDS,
    strict: bool = True,
    backend: str | None = None,
    found: Survey | None = None,
) -> Patched:
    """Makes this model record: fuses what can be fused, and watches the rest.

    Args:
        model: any model with sites, see ``find_sites``; only this instance is touched.
        kinds: units to record, of ``clue_fast.sites.KINDS``: channels of MLPs and of experts by default, heads on
            request (``attention``).
        strict: raise where something looks like a site but is none that is known, or where a gated MLP cannot be
            fused. Otherwise the first is left out and the second recorded through a hook; ``report`` says so.
        backend: forces a backend, see ``clue_fast.ops.backend``; default is the best that runs here.
        found: what ``survey`` found in this model, which is then not searched again; takes the place of kinds.

    Raises:
        PatchError: the model is patched already.
        SiteError: no site was found, or see ``strict``.
        NonFiniteError: a site gives NaN or infinity on finite input.
        BackendError, UnknownNameError: the backend cannot run here, or does not exist; no such kind.
    """
    inner = entry(model)
    if patched_of(model) is not None:
        raise PatchError(f"this {type(model).__name__} is patched already; unpatch it first")
    found = survey(model, kinds) if found is None else found
    found.check()
    if strict and found.unmatched:
        named = "; ".join(str(unmatched) for unmatched in found.unmatched[:3])
        raise SiteError(
            f"{len(found.unmatched)} modules look like sites but are none that is known: {named}. "
            "Leave them out with strict=False"
        )
    patched = Patched(model, found, backend, strict)
    inner.__dict__[_PATCHED] = patched
    return patched


def check_strictly(
    model: nn.Module,
    kinds: Iterable[str] = DEFAULT_KINDS,
    backend: str | None = None,
    found: Survey | None = None,
) -> None:
    """Raises what ``patch(model, strict=True)`` would; the model stays as it is."""
    patch(model, kinds=kinds, backend=backend, found=found).unpatch()


def patched_of(model: nn.Module) -> Patched | None:
    """Returns the ``Patched`` of this instance of a model, or None if it is not patched."""
    patched: Patched | None = entry(model).__dict__.get(_PATCHED)
    return patched


def unpatch(model: nn.Module) -> None:
    """Undoes ``patch``. Raises PatchError if the model is not patched."""
    patched = patched_of(model)
    if patched is None:
        raise PatchError(f"this {type(model).__name__} is not patched")
    patched.unpatch()
