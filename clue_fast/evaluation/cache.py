"""Finished sets of an evaluation in a folder, so that one that was interrupted goes on where it was.

Every set is a JSON file whose name is a hash of all that it depends on: the weights of the model, the tokens and the
records of the set, and how it was measured. So the folder may be shared, and nothing in it is ever wrong: what has
changed is measured anew. A file is written whole or not at all, and one that cannot be read is measured anew too.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clue_fast.data import Example, Record
from clue_fast.errors import OutputError
from clue_fast.evaluation.likelihood import AnswerScore
from clue_fast.evaluation.metrics import Metrics
from clue_fast.files import save_json, tensors_hash
from clue_fast.sites import unwrap
from clue_fast.version import __version__

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


def weights_hash(model: nn.Module) -> str:
    """A hash of every weight and buffer of a model, with its name, shape and dtype."""
    state = unwrap(model).state_dict(keep_vars=True)
    return tensors_hash({name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)})


def tokens_hash(examples: Sequence[Example]) -> str:
    """A hash of the tokens of encoded records, and of which of them are the answer."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(f"{example['input_ids']}{example['labels']};".encode())
    return digest.hexdigest()[:16]


class Cache:
    """Figures of one model by set.

    Args:
        folder: made if it is missing.
        model: whose figures they are; its weights must not change as long as this is in use.

    Raises:
        OutputError: the folder cannot be made or written.
    """

    def __init__(self, folder: str | os.PathLike[str], model: nn.Module) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"the cache {folder} is no folder and cannot be made one: {error}") from error
        self.weights = weights_hash(model)

    def path(self, tokens: str, records: Sequence[Record], settings: Mapping[str, Any]) -> Path:
        """The file of a set: its tokens, what its records say besides, and how it is measured."""
        known = {"version": __version__, "weights": self.weights, "tokens": tokens, "settings": dict(settings)}
        text = json.dumps(known, sort_keys=True, default=str) + repr([asdict(record) for record in records])
        return self.folder / f"{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:32]}.json"

    def load(self, path: Path, records: Sequence[Record]) -> Metrics | None:
        """What was measured of the records; None where nothing was, or the file cannot be read."""
        if not path.exists():
            return None
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            scores = [_score(one) for one in kept["scores"]]
            found = Metrics.from_dict(kept["figures"])
            if not len(scores) == found.count == len(found.losses):
                raise ValueError("records are missing")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s cannot be read (%s) and is measured anew", path, error)
            return None
        return replace(found, scores=scores, prefixes=kept.get("prefixes", []), records=records)

    def save(self, path: Path, name: str, metrics: Metrics) -> None:
        """Keeps what was measured of a set."""
        scores = [asdict(score) for score in metrics.scores]
        figures = metrics.as_dict()
        save_json(path, {"set": name, "figures": figures, "scores": scores, "prefixes": list(metrics.prefixes)})


def _score(kept: Mapping[str, Any]) -> AnswerScore:
    """JSON has lists for tuples."""
    values: dict[str, Any] = {name: tuple(own) if isinstance(own, list) else own for name, own in kept.items()}
    return AnswerScore(**values)
