"""Asks a model everything in each set of records, once, and hands what it answered to the metrics."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from clue_fast.data import EncodedRecords, Record, Source, check_encoding, encode_for, load_records, read_rows
from clue_fast.data.encoding import encode_whole
from clue_fast.errors import DataError, NonFiniteError, SettingError
from clue_fast.evaluation.answers import (
    answer_questions,
    check_references,
    make_questions,
    rouge_recall,
    sample_questions,
)
from clue_fast.evaluation.attacks import attack, attack_names
from clue_fast.evaluation.cache import Cache, tokens_hash
from clue_fast.evaluation.extraction import extracted_prefixes
from clue_fast.evaluation.fluency import WINDOW, read_windows, text_windows
from clue_fast.evaluation.likelihood import Mean, score_examples, truth_ratio, wrong_answer_losses
from clue_fast.evaluation.metrics import Beside, Metrics
from clue_fast.evaluation.registry import metric_names, needed
from clue_fast.evaluation.relearning import relearn as relearn_records
from clue_fast.evaluation.relearning import relearned_records

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TEXT = "text"
"""The name, among the sets, of a general text."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sets: Mapping[str, Source],
    *,
    forgotten: Collection[str] = ("forget",),
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    samples: int | Mapping[str, int] = 0,
    relearn: int | Mapping[str, int] = 0,
    attacks: Iterable[str] | Mapping[str, Iterable[str]] = (),
    metrics: str | Iterable[str] = (),
    text: str | None = None,
    retrained: Mapping[str, Metrics] | None = None,
    cache: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Metrics]:
    """Asks a model everything in each set and measures what it knows.

    The result does not depend on the batch size beyond rounding; model, tokenizer and torch's generator are left as
    they were found.

    Args:
        model: a causal language model.
        tokenizer: the model's own.
        sets: data sets by name, such as {"forget": ..., "retain": ..., "held_out": ...}, see ``load_records``; of a
            list without records nothing is measured.
        forgotten: names of the sets that are to be forgotten; see ``mean_truth_ratio``.
        batch_size: records a batch.
        max_new_tokens: longest greedy answer; None: that of the longest answer in the set.
        max_length: longest record, in tokens: what lies beyond is not scored, and answers end there. None: as many as
            the model has positions for.
        samples: answers to sample to each record, or how many by set, such as {"forget": 20}; see
            ``sampled_answers``. Each takes as long as a greedy answer.
        relearn: records of a set that a copy of the model learns again before it is asked the others, or how many by
            set; see ``clue_fast.evaluation.relearn``.
        attacks: names of attacks, see ``clue_fast.evaluation.attack``, or which by set; examples in their prompts are
            records of the first set that is to be kept.
        metrics: names of further metrics, see ``clue_fast.evaluation.METRICS``, or "all". One whose inputs are missing
            is skipped, with the reason in ``Metrics.skipped``.
        text: a general text, whose perplexity is measured too; it is the set "text" of the results.
        retrained: the same sets by a model that was trained without the forget set, for metrics that compare with it.
        cache: a folder for sets that are finished, see ``clue_fast.evaluation.cache``; the same evaluation, begun
            again, goes on behind them.
        seed: of all that is drawn.
        progress: shows bars for what takes longer than a second.

    Raises:
        NonFiniteError: the model's loss on a record is NaN or infinite.
        DataError: a record leaves nothing to ask or to measure, or the retrained model has another tokenizer.
        SettingError: samples is below 0, or relearn is, or leaves no record to ask.
        UnknownNameError: there is no such metric, or no such attack.
        OutputError: the cache cannot be written.
    """
    asked = metric_names(metrics)
    needs = needed(asked)
    if text is not None and TEXT in sets:
        raise SettingError(f"a set is named {TEXT!r}, as the results name the general text; name it otherwise")
    drawn = samples if isinstance(samples, Mapping) else dict.fromkeys(sets, samples)
    relearned = relearn if isinstance(relearn, Mapping) else dict.fromkeys(sets, relearn)
    rows = {name: read_rows(source, name) for name, source in sets.items()}
    read = {name: load_records(own, name) if own else [] for name, own in rows.items()}
    check_evaluation(read, drawn, relearned)
    data = {name: _encoded(records, tokenizer, name) for name, records in read.items()}
    check_encoding(model, data, tokenizer, max_length)
    tried = {name: attack_names(attacks.get(name, ()) if isinstance(attacks, Mapping) else attacks) for name in data}
    kept = next((records for name, records in data.items() if name not in forgotten and records), None)
    store = None if cache is None else Cache(cache, model)
    common: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    results = {}
    for name, records in data.items():
        plan = _Plan(
            forgotten=name in forgotten,
            samples=drawn.get(name, 0),
            relearn=relearned.get(name, 0),
            attacks=tried[name],
            seed=seed,
            max_new_tokens=max_new_tokens,
            max_length=max_length,
            vocabulary="vocabulary" in needs,
            prefixes="prefixes" in needs,
        )
        tokens = tokens_hash(records.examples)
        path = None
        if store is not None:
            shown = [] if kept is None or not plan.attacks else [asdict(record) for record in kept]
            path = store.path(tokens, records, {**asdict(plan), "examples": shown})
        found = None if store is None or path is None else store.load(path, records)
        if found is None:
            found = _measure(model, tokenizer, records, name, plan, kept, common)
            found = replace(found, tokens=tokens)
            if store is not None and path is not None:
                store.save(path, name, found)
        results[name] = replace(found, asked=asked)
    if text is not None:
        results[TEXT] = replace(_read(model, tokenizer, text, max_length, common), asked=asked)
    return relate(results, retrained)


def relate(results: Mapping[str, Metrics], retrained: Mapping[str, Metrics] | None = None) -> dict[str, Metrics]:
    """Figures of one model with the metrics that look at several sets, or at those of a retrained model.

    Args:
        results: by set.
        retrained: the same sets by a model that was trained without the forget set.

    Raises:
        DataError: the tokens of a set are other ones for the retrained model.
    """
    others = {} if retrained is None else retrained
    _check_tokens(
        {name: metrics.tokens for name, metrics in results.items()}, {name: own.tokens for name, own in others.items()}
    )
    return {name: metrics.measured(Beside(name, results, others)) for name, metrics in results.items()}


def check_retrained(sets: Mapping[str, EncodedRecords], retrained: Mapping[str, Metrics]) -> None:
    """Raises the DataError of ``relate`` before any model is asked.

    Args:
        sets: what is to be measured.
        retrained: figures of the retrained model.
    """
    tokens = {name: tokens_hash(records.examples) for name, records in sets.items()}
    _check_tokens(tokens, {name: metrics.tokens for name, metrics in retrained.items()})


def check_tokenizers(
    sets: Mapping[str, Sequence[Record]], tokenizer: PreTrainedTokenizerBase, retrained: PreTrainedTokenizerBase
) -> None:
    """Checks that two tokenizers cut the records alike.

    Raises:
        DataError: they do not.
    """
    own, other = ({n: tokens_hash(encode_whole(s, t, n)) for n, s in sets.items()} for t in (tokenizer, retrained))
    _check_tokens(own, other)


def _check_tokens(tokens: Mapping[str, str | None], retrained: Mapping[str, str | None]) -> None:
    """Raises DataError where both are known and differ; by set, see ``tokens_hash``."""
    for name, own in tokens.items():
        other = retrained.get(name)
        if own is not None and other is not None and own != other:
            raise DataError(
                f"the {name} set has other tokens for the retrained model than for this one: it has another tokenizer, "
                "or its figures are of other records, and losses a token cannot be compared; retrain with the same one"
            )


@dataclass(frozen=True)
class _Plan:
    """How a set is measured, and all that the figures depend on besides model, tokenizer and records."""

    forgotten: bool
    samples: int
    relearn: int
    attacks: tuple[str, ...]
    seed: int
    max_new_tokens: int | None
    max_length: int | None
    vocabulary: bool
    prefixes: bool

    @property
    def limits(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, "max_length": self.max_length}


def _encoded(records: list[Record], tokenizer: PreTrainedTokenizerBase, name: str) -> EncodedRecords:
    known = isinstance(records, EncodedRecords) and records.tokenizer is tokenizer
    return records if known else EncodedRecords(records, tokenizer, name)  # type: ignore[return-value]


def _measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: EncodedRecords,
    name: str,
    plan: _Plan,
    kept: Sequence[Record] | None,
    common: dict[str, Any],
) -> Metrics:
    """Asks a model everything in one set; see ``evaluate``."""
    examples = encode_for(model, records, tokenizer, plan.max_length)
    scores = score_examples(
        model, tokenizer, examples, vocabulary=plan.vocabulary, description=f"{name}: scoring answers", **common
    )
    for number, score in enumerate(scores, start=1):
        if not math.isfinite(score.loss):
            raise NonFiniteError(
                f"the loss of record {number} of the {name} set is {score.loss}; look for NaN in the model's weights"
            )
    questions = make_questions(model, tokenizer, records.examples, **plan.limits)
    answers = answer_questions(model, tokenizer, questions, description=f"{name}: answering", **common)
    references = [record.completion for record in records]
    measured: dict[str, Any] = {"answers": answers, "rouge_recalls": rouge_recall(references, answers)}
    if records and all(record.perturbed for record in records):
        options = {"description": f"{name}: truth ratio", **common}
        wrong = wrong_answer_losses(model, tokenizer, records, max_length=plan.max_length, **options)
        averaged: Mean = "geometric" if plan.forgotten else "arithmetic"
        measured["truth_ratios"] = [truth_ratio(right, losses, averaged) for right, losses in wrong]
        measured["perturbed_losses"] = [losses for _, losses in wrong]
    if plan.samples:
        sampled = sample_questions(
            model, tokenizer, questions, plan.samples, seed=plan.seed, description=f"{name}: sampling answers", **common
        )
        pairs = zip(references, sampled, strict=True)
        best = [max(rouge_recall([reference] * plan.samples, some)) for reference, some in pairs]
        measured |= {"samples": plan.samples, "best_recalls": best}
    if plan.prefixes:
        description = f"{name}: extracting answers"
        measured["prefixes"] = extracted_prefixes(model, tokenizer, examples, scores, description=description, **common)
    if plan.relearn:
        learned, others = _dealt_out(records, plan.relearn, plan.seed)
        options = {"description": f"{name}: relearning", **plan.limits, **common}
        found = relearn_records(model, tokenizer, learned, others, **options)
        measured |= {
            "relearned": plan.relearn,
            "answered_before_relearning": found.answered_before,
            "answered_after_relearning": found.answered_after,
        }
    if plan.attacks:
        attacked = attack(
            model, tokenizer, records, plan.attacks, examples=kept, seed=plan.seed, **plan.limits, **common
        )
        measured["attacks"] = {own: one.as_dict() for own, one in attacked.items()}
    return Metrics.of(scores, forgotten=plan.forgotten, records=records, **measured)


def _read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_length: int | None,
    common: dict[str, Any],
) -> Metrics:
    """The losses of a general text."""
    examples = text_windows(model, tokenizer, text, WINDOW if max_length is None else max_length)
    scores = read_windows(model, tokenizer, examples, **common)
    return Metrics.of(scores, text=True, tokens=tokens_hash(examples))


def _dealt_out(records: Sequence[Record], count: int, seed: int) -> tuple[list[Record], list[Record]]:
    """So many of the records, drawn by the seed, and the others."""
    drawn = relearned_records(len(records), count, seed)
    dealt: tuple[list[Record], list[Record]] = ([], [])
    for index, record in enumerate(records):
        dealt[index not in drawn].append(record)
    return dealt


def check_evaluation(
    sets: Mapping[str, Sequence[Record]], samples: Mapping[str, int], relearn: Mapping[str, int]
) -> None:
    """Raises what ``evaluate`` would, before any model is asked.

    Args:
        sets: as of ``evaluate``.
        samples, relearn: answers to sample and records to relearn, by set.

    Raises:
        DataError: an answer has no word.
        SettingError: so many answers cannot be sampled, or so many records relearned.
    """
    for name, number in samples.items():
        if number < 0:
            raise SettingError(f"samples {number} of the {name} set is below 0; 0 samples nothing")
    for name, number in relearn.items():
        if not 0 <= number < max(1, len(sets[name])):
            raise SettingError(
                f"relearn {number} leaves none of the {len(sets[name])} records of the {name} set to ask; choose fewer"
            )
    for name, records in sets.items():
        check_references([record.completion for record in records], name)
