"""The fingerprint of a model: what statistics and selections are tied to."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from clue_fast.sites.wrapping import unwrap


def model_fingerprint(model: nn.Module) -> str:
    """Returns a short hash of what a model is: names and shapes of its weights, and a sample of its embedding.

    Unlearning trains neither, so a model keeps its fingerprint through it, while another architecture, or the same
    one with other weights, has another. The sample is rounded to bfloat16, so that loading in another precision
    does not matter.
    """
    model = unwrap(model)
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{tuple(tensor.shape)};".encode())
    embedding = _input_embedding(model)
    if embedding is not None and embedding.device.type != "meta":
        whole: Tensor = embedding.full_tensor() if hasattr(embedding, "full_tensor") else embedding  # sharded, or not
        sample = whole.detach().reshape(-1)
        stride = max(1, sample.numel() // 4096)
        digest.update(sample[::stride].to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _input_embedding(model: nn.Module) -> Tensor | None:
    get_embeddings = getattr(model, "get_input_embeddings", None)
    embedding = get_embeddings() if callable(get_embeddings) else None
    weight = getattr(embedding, "weight", None)
    return weight if isinstance(weight, Tensor) else None
