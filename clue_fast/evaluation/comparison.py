"""Evaluations side by side: every metric on every set, before and after unlearning, beside a retrained model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from clue_fast.config import EvalConfig
from clue_fast.data import Source, load_further_sets, load_sets
from clue_fast.deprecated import RenamedAttribute, renamed_arguments
from clue_fast.errors import DataError
from clue_fast.evaluation.likelihood import forget_quality
from clue_fast.evaluation.measurement import evaluate
from clue_fast.evaluation.metrics import Metrics, metric_title
from clue_fast.evaluation.registry import METRICS
from clue_fast.tables import markdown

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Row:
    """One metric on one set of records.

    Attributes:
        set, metric: as ``evaluate`` names them.
        title: of the metric, in a table.
        before, after: unlearning.
        retrained: of a model that was trained without the forget set; None where there is none.
        trained: after training and before the update was scaled down; None where it was not.
    """

    set: str
    metric: str
    title: str
    before: float
    after: float
    retrained: float | None
    trained: float | None = None

    reference = RenamedAttribute("retrained")

    @property
    def kept(self) -> float | None:
        """After over before; None where before is 0."""
        return self.after / self.before if self.before else None


@dataclass(frozen=True)
class Comparison:
    """Every metric on every set, before and after.

    Attributes:
        rows: one per set and metric.
        forget_quality: (p, D) against the retrained model, by set to be forgotten and by stage ("before", "after" and,
            where the update was scaled down, "trained"); empty without truth ratios of both.
    """

    rows: tuple[Row, ...]
    forget_quality: dict[str, dict[str, tuple[float, float]]]

    def row(self, set: str, metric: str) -> Row:
        """The row of one set and metric, such as ("forget", "answered")."""
        for row in self.rows:
            if (row.set, row.metric) == (set, metric):
                return row
        raise KeyError((set, metric))

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "rows": [{**asdict(row), "kept": row.kept} for row in self.rows],
            "forget_quality": {
                name: {stage: {"p": p, "statistic": statistic} for stage, (p, statistic) in stages.items()}
                for name, stages in self.forget_quality.items()
            },
        }

    def table(self) -> str:
        """The comparison as an aligned Markdown table."""
        columns = {"before": "before", "after": "after"}
        if any(row.trained is not None for row in self.rows):
            columns = {"before": "before", "trained": "after training", "after": "after scaling"}
        if any(row.retrained is not None for row in self.rows):
            columns["retrained"] = "retrained"
        header = ["set", "metric", *columns.values()]
        body = [
            [row.set.replace("_", " "), row.title, *(_number(getattr(row, stage)) for stage in columns)]
            for row in self.rows
        ]
        for name, stages in self.forget_quality.items():
            values = [f"{stages[stage][0]:.1e}" for stage in columns if stage != "retrained"]
            body.append([name.replace("_", " "), "forget quality (KS p)", *values, "1"])
        return markdown([header, *body], left=2)


@renamed_arguments(reference="retrained")
def compare(
    before: Mapping[str, Metrics],
    after: Mapping[str, Metrics],
    retrained: Mapping[str, Metrics] | None = None,
    trained: Mapping[str, Metrics] | None = None,
) -> Comparison:
    """Puts two evaluations of the same sets side by side.

    Args:
        before: results of `evaluate` before unlearning.
        after: results of `evaluate` after it, on the same sets.
        retrained: results of a model that was trained without the forget set.
        trained: results after training, where the update was scaled before ``after``.

    Raises:
        DataError: the evaluations are of different sets.
    """
    for stage, other in (("after", after), ("retrained", retrained), ("trained", trained)):
        if other is None:
            continue
        if {name: m.count for name, m in other.items()} != {name: m.count for name, m in before.items()}:
            raise DataError(
                f"the evaluations 'before' and {stage!r} are not of the same sets; evaluate both on the same"
            )
        for name, metrics in before.items():
            for count in ("samples", "relearned"):
                wanted, found = getattr(metrics, count), getattr(other[name], count)
                if wanted and found not in (0, wanted):
                    raise DataError(
                        f"of the {name} set, {count} is {wanted} 'before' and {found} in {stage!r}; measure both alike"
                    )
    rows = tuple(
        Row(
            name,
            metric,
            metric_title(metric, before[name].summary()),
            first,
            last,
            _of(retrained, name, metric),
            _of(trained, name, metric),
        )
        for name in before
        for metric in METRICS
        if metric != "forget_quality"  # has rows of its own
        if (first := before[name].value(metric)) is not None and (last := after[name].value(metric)) is not None
    )
    quality = {}
    stages = {"before": before, "after": after} | ({} if trained is None else {"trained": trained})
    for name, known in ({} if retrained is None else retrained).items():
        ratios = {stage: figures[name].truth_ratios for stage, figures in stages.items()}
        forgotten = name == "forget" if known.forgotten is None else known.forgotten
        if forgotten and known.truth_ratios and all(ratios.values()):
            quality[name] = {stage: forget_quality(some, known.truth_ratios) for stage, some in ratios.items()}
    return Comparison(rows, quality)


@renamed_arguments(reference="retrained")
def evaluate_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    forget: Source,
    retain: Source,
    held_out: Source | None = None,
    retrained: PreTrainedModel | None = None,
    before: PreTrainedModel | None = None,
    unseen: Source | None = None,
    real_authors: Source | None = None,
    world_facts: Source | None = None,
    text: str | None = None,
    cache: str | os.PathLike[str] | None = None,
    samples: int = EvalConfig.samples,
    relearn: int = EvalConfig.relearn,
    attacks: Iterable[str] | None = EvalConfig.attacks,
    metrics: Iterable[str] | None = EvalConfig.metrics,
    seed: int = EvalConfig.seed,
    max_length: int = EvalConfig.max_length,
    progress: bool = EvalConfig.progress,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Returns the figures of a model, and of those that it is compared with, with the values of each record.

    They are ``{"before": {set: figures}, "model": {set: figures}, "retrained": {set: figures}}``.

    Args:
        model: a causal language model.
        tokenizer: of the model.
        forget, retain, held_out: data sets, see ``clue_fast.data.load_records``.
        retrained: a model that was trained without the forget set, to compare with; of the same tokenizer, which
            ``check_tokenizers`` checks.
        before: the model before it unlearned, to compare with.
        unseen: records that no model was trained on, for membership inference.
        real_authors, world_facts: what else there is to know, for the model utility of TOFU.
        text: a general text, for the perplexity.
        cache: a folder for finished sets, see ``clue_fast.evaluate``.
        samples, relearn, attacks, metrics, seed, max_length, progress: see ``clue_fast.config.EvalConfig``.
    """
    config = EvalConfig.of(locals())
    sets = load_sets(forget, retain, held_out)
    sets |= load_further_sets(sets, unseen=unseen, real_authors=real_authors, world_facts=world_facts)
    options: dict[str, Any] = {"text": text, "cache": cache, **config.measures}
    known = None if retrained is None else evaluate(retrained, tokenizer, sets, **options)
    models = {"before": before, "model": model}
    found = {
        title: evaluate(one, tokenizer, sets, retrained=known, **options)
        for title, one in models.items()
        if one is not None
    }
    found |= {} if known is None else {"retrained": known}
    return {title: {name: m.as_dict() for name, m in figures.items()} for title, figures in found.items()}


def _of(evaluation: Mapping[str, Metrics] | None, name: str, metric: str) -> float | None:
    return None if evaluation is None else evaluation[name].value(metric)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
