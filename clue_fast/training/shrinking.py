"""Keeps no more of an update than it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from clue_fast.training.sparse import Sparse


@torch.no_grad()
def shrink(sparse: Sparse, enough: Callable[[], bool], steps: int = 5) -> float:
    """Shrinks the update to the smallest share of it that is still enough, found by bisection.

    The selected weights become original + share * (trained - original). What was forgotten goes on being forgotten
    for a good part of the way back, while what was damaged on the way heals. A share for a whole update, chosen by
    what the model then does, is the scaling coefficient of task vectors: Ilharco et al. 2023, "Editing Models with
    Task Arithmetic" (arXiv 2212.04089).

    Args:
        sparse: after training.
        enough: whether the model, as it is at the moment, will do.
        steps: of the bisection; the share is found to within 2 ** -steps.

    Returns:
        The share that was kept: 1 if nothing less is enough, or not even the whole.
    """
    if not enough():
        return 1.0
    originals = [part.original.float() for part in sparse.parts]
    trained = [part.selected.detach().clone() if part.has_master else part.read().float() for part in sparse.parts]

    def keep(share: float) -> None:
        for part, before, after in zip(sparse.parts, originals, trained, strict=True):
            part.set_values(after if share == 1.0 else torch.lerp(before, after, share))

    too_little, share = 0.0, 1.0
    for _ in range(steps):
        middle = (too_little + share) / 2
        keep(middle)
        if enough():
            share = middle
        else:
            too_little = middle
    keep(share)
    return share
