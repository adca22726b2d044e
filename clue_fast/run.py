"""The stages of ``unlearn``, one after another: localize, train, scale, evaluate, save."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from clue_fast.config import UnlearnConfig, default_learning_rate
from clue_fast.data import Record
from clue_fast.errors import ExtraError
from clue_fast.evaluation import Metrics, evaluate, relate
from clue_fast.files import output_folder, save_json, tensors_hash
from clue_fast.html_report import REPORT, describe_data, site_counts, write_report
from clue_fast.internals import source_name
from clue_fast.localization import localize_records
from clue_fast.objectives import Objective
from clue_fast.reporting import RESULTS, write_model_card, write_plots
from clue_fast.selection import RELIABILITY, Selection
from clue_fast.sites import find_sites
from clue_fast.sparse import Sparse, changed_inside, changed_outside, owned_weights, snapshot
from clue_fast.trainer.stages import Schedule, Stage, get_stages
from clue_fast.trainer.training import check_rates, described, train_selected
from clue_fast.trainer.update_scale import REPORTED, Split, holding, scale_to_target
from clue_fast.version import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

TRAINING = (
    "learning_rate",
    "layer_lr",
    "epochs",
    "rounds",
    "batch_size",
    "retain_ratio",
    "lower_layers_gb",
    "packed_tokens",
    "forget_target",
    "master_weights",
    "stochastic_rounding",
    "seed",
)
"""Settings of a training as the results have them."""


@dataclass
class Run:
    """The stages of ``unlearn``, one after another, and what each leaves to the next.

    Attributes:
        config: with every setting of the training settled, see ``_settled``.
        sets: the records of ``forget``, ``retain`` and, where there are any, ``held_out``.
        asked: these and the records that are only asked.
        text: whose perplexity is measured.
        others: other answers to the forget questions.
        retrained: a model to compare with, or what was measured of it.
        schedule, stages: the published schedule, and all stages that were asked for.
        split: of the forget records, where the update is scaled to a target.
        selection: what trains; after several rounds, what any of them trained.
        kept: the stages that have units to train.
        evaluation: figures by stage ("before", "trained", "after", "retrained") and set.
        seconds: by stage.
        before: the weights before the training.
        whole: the weights that the training changed, before the update was scaled.
        scaling: how the update was scaled, as the results have it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config: UnlearnConfig
    output_dir: Path
    sets: Mapping[str, list[Record]]
    asked: Mapping[str, list[Record]]
    text: str | None
    others: list[Record] | None
    retrained: PreTrainedModel | Mapping[str, Metrics] | None
    objective: Objective
    schedule: Schedule | None
    stages: tuple[Stage, ...] | None
    split: Split | None
    selection: Selection | None
    kept: tuple[Stage, ...] | None = None
    evaluation: dict[str, Mapping[str, Metrics]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    before: Mapping[str, Tensor] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    scaling: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    trained: int = 0

    sparse: Sparse = field(init=False)

    @property
    def selected(self) -> Selection:
        """The selection, once there is one."""
        assert self.selection is not None
        return self.selection

    def keep_stages(self, selection: Selection) -> None:
        """Keeps the stages that a selection has units for."""
        if self.stages is not None and self.kept is None:
            self.kept = get_stages(self.stages, self.objective, selection)

    def localize(self) -> None:
        """Selects units unless that was done before; the first stage, since it refuses what makes no sense early."""
        with _stage("localize", self.seconds):
            if self.selection is None:
                self.selection = self._localized(self.config)
            self.keep_stages(self.selection)
            if self.config.learning_rate is None:
                sites = find_sites(self.model, {site.kind for site in self.selection.sites})
                share = max(1, len(self.selection)) / sum(site.width for site in sites)
                self.config = replace(self.config, learning_rate=default_learning_rate(self.model, share))
            check_rates(self.config.layer_lr, self.selection)

    def _localized(self, config: UnlearnConfig) -> Selection:
        sets = {name: self.sets[name] for name in ("forget", "retain")}
        return localize_records(self.model, sets, self.tokenizer, config)

    def evaluate(self, stage: str) -> None:
        """Measures the model as it is."""
        with _stage(f"evaluate {stage}", self.seconds):
            self.evaluation[stage] = self._measured(self.model)

    def _measured(self, model: PreTrainedModel) -> dict[str, Metrics]:
        return evaluate(model, self.tokenizer, self.asked, text=self.text, **self.config.measures)

    def train(self) -> None:
        """Trains the selected units, selected anew in each round after the first; the model stays sparse."""
        assert self.config.epochs is not None
        part = replace(self.config, epochs=self.config.epochs / self.config.rounds, permutations=0)
        self.before = self._snapshot()
        self._train(self.selected, part)
        for number in range(1, self.config.rounds):
            self.sparse.restore()
            part = replace(part, seed=self.config.seed + number)
            with _reverted_on_failure(self.model, self.before):
                with _stage("localize", self.seconds):
                    selection = self._localized(part)
                self._train(selection, part)
            self.selection = _joined(self.selected, selection)
        self.trained = owned_weights(self.model, self.selected)

    def _snapshot(self) -> Mapping[str, Tensor]:
        """The weights as they are: in a file, since they are looked at once, or in memory where no file has room."""
        try:
            return snapshot(self.model, tempfile.gettempdir())
        except OSError as error:
            logger.info("the weights before the training are kept in memory: %s", error)
            return snapshot(self.model)

    def _train(self, selection: Selection, config: UnlearnConfig) -> None:
        """One round."""
        with _stage("train", self.seconds):
            self.sparse, history = train_selected(
                self.model,
                self.tokenizer,
                self.sets,
                selection,
                self.objective,
                config,
                alternate=self.others,
                stages=self.kept,
            )
            done = self.history[-1]["step"] if self.history else 0
            self.history += [{**entry, "step": done + entry["step"]} for entry in history]

    def scale(self) -> None:
        """Scales the update down to what the target takes, where there is one."""
        if self.split is None or self.config.forget_target is None:
            return
        with _stage("scale", self.seconds):
            weights = ((name, weight.detach().cpu()) for name, weight in self.model.named_parameters())
            changed = ((n, w) for n, w in weights if n in self.before and not torch.equal(w, self.before[n]))
            self.whole = {name: weight.clone() for name, weight in changed}
            validation = [self.sets["forget"][index] for index in self.split.validation]
            scale, unanswered = scale_to_target(
                self.sparse, self.model, self.tokenizer, validation, self.config.forget_target, self.config.max_length
            )
            self.scaling = {
                "forget_target": self.config.forget_target,
                "update_scale": scale,
                "unanswered": unanswered,
                "validation": [index + 1 for index in self.split.validation],
                "reported": [index + 1 for index in self.split.reported],
                "rewordings": sum(record.paraphrased_prompt is not None for record in validation),
            }

    def evaluate_trained(self) -> None:
        """Measures the trained model, as it was before its update was scaled too, and the retrained one."""
        with _stage("evaluate after", self.seconds):
            if self.split is not None:
                with holding(self.model, self.whole):
                    self.evaluation["trained"] = self._measured(self.model)
            self.evaluation["after"] = self._measured(self.model)
            if self.retrained is not None:
                known = self.retrained
                figures = known if isinstance(known, Mapping) else self._measured(known)
                self.evaluation = {stage: relate(own, figures) for stage, own in self.evaluation.items()}
                self.evaluation["retrained"] = figures
            if self.split is not None:
                for stage, figures in self.evaluation.items():
                    self.evaluation[stage] = {REPORTED: figures["forget"].subset(self.split.reported), **figures}

    def results(self) -> dict[str, Any]:
        """Everything that ``results.json`` holds."""
        selection, reliability = self.selected, self.selected.reliability
        weights = dict(self.model.named_parameters())
        return {
            "clue_fast": __version__,
            "settings": self._settings(),
            **describe_data(self.asked),
            "evaluation": {
                stage: {name: metrics.as_dict() for name, metrics in figures.items()}
                for stage, figures in self.evaluation.items()
            },
            "selection": {
                "units": len(selection),
                "of": sum(site.width for site in selection.sites),
                "hash": selection.hash,
                "sites": site_counts(selection),
                **({} if reliability is None else {RELIABILITY: reliability.as_dict()}),
            },
            "weights": {
                "total": sum(weight.numel() for weight in weights.values()),
                "trained": self.trained,
                "changed_inside": changed_inside(self.before, self.model, selection),
                "changed_outside": changed_outside(self.before, self.model, selection),
                "hash": {
                    "before": tensors_hash(self.before, weights),
                    "after": tensors_hash(weights),
                },
            },
            **({"scaling": self.scaling} if self.scaling else {}),
            "history": self.history,
            "seconds": dict(self.seconds),
        }

    def _settings(self) -> dict[str, Any]:
        config, rate = self.config, self.config.layer_lr
        training = {name: getattr(config, name) for name in TRAINING}
        course: dict[str, Any] = {}
        if self.stages is not None and self.kept is not None:
            course = described(self.stages, self.kept, self.schedule, training, self.objective)
        return {
            **{name: value for name, value in self.selected.source.items() if name != RELIABILITY},
            **training,
            "layer_lr": rate if isinstance(rate, int | float) else str(rate),
            "objective": self.objective.name,
            **asdict(self.objective),
            **course,
            "records": {name: len(records) for name, records in self.asked.items()},
        }

    def save(self, results: Mapping[str, Any]) -> None:
        """Writes the checkpoint, its model card, the selection, the results, their report and the plots."""
        with _stage("save", self.seconds), output_folder(self.output_dir) as folder:
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            self.selected.save_pretrained(folder)
            save_json(folder / RESULTS, results)
            write_report(folder / REPORT, {self.output_dir.name: results})
            write_model_card(folder, results, source_name(self.model), self.output_dir.name)
            try:
                write_plots(folder, self.selected, self.selected.statistics, self.history)
            except ExtraError as error:
                logger.warning("no plots: %s", error)
            except Exception as error:  # pictures of what is in the other files
                logger.warning("the plots could not be written: %s", error)


@contextmanager
def _stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Times a stage, and logs one line at its end."""
    started = time.perf_counter()
    yield
    taken = time.perf_counter() - started
    seconds[name] = seconds.get(name, 0.0) + taken
    logger.info("%s: %.1f s", name, taken)


@contextmanager
def _reverted_on_failure(model: torch.nn.Module, before: Mapping[str, Tensor]) -> Iterator[None]:
    """Gives a model the weights from before, should the block fail."""
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.copy_(before[name])
        raise


def _joined(first: Selection, second: Selection) -> Selection:
    """What either selects, with the scores, the source and the statistics of the first."""
    joined = Selection(first.sites, (first | second).categories, first.scores, first.source, first.fingerprint)
    joined.statistics = first.statistics
    return joined
