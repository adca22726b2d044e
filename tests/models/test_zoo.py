"""Every causal language model that the installed transformers can build: each MLP is found, and nothing else is.

The zoo gives MLPs widths that no other part of a model has. So the projections that read so many channels are those
that sites must end in.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clue_fast
from clue_fast.sites import survey
from tests.models.zoo import KINDS, make_tiny

pytestmark = pytest.mark.slow

WIDTHS = (24, 40, 48, 96, 128)  # 96: shared experts twice 48; 128: families whose MLPs are 4 times as wide as the model
STACKED = ("down_proj", "w2", "output_linear.weight")
IDS = torch.arange(3, 19).reshape(2, 8)

# What is refused, by class of the module. The first three have no site at all.
REFUSED = {
    "cpmant": {"CpmAntAttention"},  # its MLP has gate and up in a module of their own
    "falcon_mamba": {"FalconMambaMixer"},
    "mamba": {"MambaMixer"},
    "inkling_text": {"InklingSharedExperts"},  # gate and up stacked apart
    "llama4_text": {"Llama4TextExperts"},  # is given its tokens sorted by expert
    "longcat_flash": {"LongcatFlashExperts"},  # some experts are the identity
    "nemotron_h": {"NemotronHExperts"},  # no gate
    "zamba2": {"Zamba2MLP"},  # which adapter it has depends on the layer that calls it
}
NOT_SEEN = {"cpmant", "jetmoe"}  # jetmoe: experts stacked in modules of their own
ADAPTERS = {"xmod"}


def make(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A model of the zoo; skips what it cannot build, and says why."""
    try:
        model = make_tiny(kind).to(dtype)
    except Exception as error:
        pytest.skip(f"{kind}: {type(error).__name__}: {error}".replace("\n", " "))
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model


def logits(model: nn.Module) -> Tensor:
    """Skips where the stock model does not run on token ids alone."""
    try:
        with torch.no_grad():
            return model(input_ids=IDS).logits.double()
    except Exception as error:
        pytest.skip(f"the stock model does not run: {type(error).__name__}: {error}".replace("\n", " "))


def ends(model: nn.Module) -> set[str]:
    """Paths of what reads as many channels as MLPs have: projections, and what stacks those of experts."""
    found = {path for path, parameter in model.named_parameters() if parameter.dim() == 3 and path.endswith(STACKED)}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            inputs = weight.shape[0] if hasattr(module, "nf") else getattr(module, "in_features", 0)
            found |= {path} if inputs in WIDTHS else set()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_sites(kind: str) -> None:
    model = make(kind)
    found = survey(model)
    outputs, refused = {site.output for site in found.sites}, [unmatched.path for unmatched in found.unmatched]
    assert {unmatched.type for unmatched in found.unmatched} == REFUSED.get(kind, set())
    missing = {path for path in ends(model) - outputs if not path.startswith(tuple(f"{r}." for r in refused))}
    assert bool(missing) == (kind in NOT_SEEN), missing
    assert bool(outputs - ends(model)) == (kind in ADAPTERS), outputs - ends(model)


@pytest.mark.parametrize("kind", KINDS)
def test_logits(kind: str) -> None:
    """Patched and recording, they are from the stock model at most twice as far as that is from float64."""
    model = make(kind)
    stock = logits(model)
    if not survey(model).sites:
        pytest.skip("no sites")
    exact = logits(make(kind, torch.float64))
    with clue_fast.patch(model, strict=False) as patched, patched.record("forget"):
        found = logits(model)
    assert int(patched.statistics.count.sum()) > 0
    assert (found - stock).norm() <= 2 * (stock - exact).norm() + torch.finfo(torch.float32).eps * stock.norm()
