"""Models and data sets of a run, loaded and checked."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch
from torch import nn

from clue_fast.data import Record, Source, check_disjoint, load_records
from clue_fast.errors import ModelError, NonFiniteError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    name: str | os.PathLike[str], *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a causal language model and its tokenizer from a folder or from the hub, onto the GPU if there is one.

    Raises:
        ModelError: there is no such model, or it cannot be read.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name = os.fspath(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=trust_remote_code, dtype="auto")
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"cannot load the model {name}: {reason[0]} "
            "Name a folder with a Hugging Face checkpoint, or a model of the hub"
        ) from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device), tokenizer  # type: ignore[arg-type]


def check_weights(model: nn.Module) -> None:
    """Raises NonFiniteError naming the first weight that is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise NonFiniteError(f"the weight {name} holds NaN or infinity; load the model again or repair it")


def load_sets(forget: Source, retain: Source, held_out: Source | None = None) -> dict[str, list[Record]]:
    """Reads the data sets of a run. Raises DataError if one cannot be read or two of them share records."""
    sources = {"forget": forget, "retain": retain} | ({} if held_out is None else {"held_out": held_out})
    sets = {name: load_records(source, name) for name, source in sources.items()}
    check_disjoint(sets)
    return sets
