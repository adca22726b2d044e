"""Ranks train selected units of a model that FSDP2 shards, in every way, and save what they end with.

python train_ranks.py FOLDER RANKS [compiled]

RANKS are numbers of ranks with commas between, which run one after another; what they save is in a folder by their
number. With a third word they are compiled, and nothing else: that takes as long as everything else.
"""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

sys.path.insert(0, str(Path(__file__).parents[2]))
from clue_fast.data import Collator
from clue_fast.errors import SparseError
from clue_fast.selection import CONFLICT, Selection
from clue_fast.sites import find_sites, model_fingerprint
from clue_fast.sparse import (
    Sparse,
    SparseAdamW,
    SparseSGD,
    changed_inside,
    changed_outside,
    fully_shard,
    snapshot,
    sparsify,
)
from clue_fast.sparse.optimizer import SparseOptimizer
from tests.models import families
from tests.models.small_llama import examples, llama, random_selection

STEPS = 3
LATER = (
    "torch._dynamo",
    "torch.distributed.checkpoint.state_dict",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
)
"""What every rank would import for itself as soon as it needs it, in more time than all the rest takes."""

UNEVEN = {
    "hidden_size": 30,
    "intermediate_size": 50,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "mlp_bias": True,
}
"""Neither 30 columns nor 50 rows can be divided by four, 50 rows of a bias neither."""


def spread(model: nn.Module, units: int) -> Selection:
    """So many units of every site, as far from one another as they can be, so that every rank has as many."""
    return given(model, lambda width: range(0, width, width // units))


def first(model: nn.Module, units: int) -> Selection:
    """The first units of every site, which lie on the first rank."""
    return given(model, lambda width: range(units))


def given(model: nn.Module, choose: Callable[[int], range]) -> Selection:
    """The chosen units of every site, as conflict units."""
    sites = tuple(find_sites(model))
    categories = {site: torch.zeros(site.width, dtype=torch.int8) for site in sites}
    for site in sites:
        categories[site][list(choose(site.width))] = CONFLICT
    return Selection(sites, categories, {s: torch.rand(s.width) for s in sites}, {}, model_fingerprint(model))


@dataclass(frozen=True)
class Way:
    """One way to train.

    Attributes:
        dtype: of the weights.
        select: makes the selection.
        optimizer: makes the optimizer of the sparse model.
        layers: whether every layer is sharded by itself, or the model as one.
        config: of the Llama; of a mixture, None.
        checkpointing: whether layers run again in the backward pass; "reentrant" by the way that torch had first.
        narrow: whether FSDP2 gathers weights of float32 in bfloat16; one process then has them in bfloat16.
        categories: whether every second batch has no record that is to be forgotten.
    """

    dtype: torch.dtype = torch.float32
    select: Callable[[Any], Selection] = random_selection
    optimizer: Callable[[Any], SparseOptimizer] = lambda model: SparseAdamW(model, lr=1e-2, weight_decay=0.1)
    layers: bool = True
    config: dict[str, Any] | None = field(default_factory=lambda: UNEVEN)
    checkpointing: bool | str = False
    categories: bool = False
    narrow: bool = False

    def model(self, shared: bool = False) -> Any:
        """The model before it trains, as one process has it, or ranks share it."""
        made = families.make_model("mixtral") if self.config is None else llama(self.dtype, **self.config)
        made.train()
        if self.checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": self.checkpointing == "reentrant"})
        return made.float() if self.narrow and shared else made

    def batch(self, number: int) -> dict[str, Tensor]:
        """A batch of one rank, or of one of the passes that one process makes."""
        if self.config is None:  # of so few tokens that no batch meets all experts
            return families.make_batch("mixtral", rows=2, tokens=2, seed=number)
        return Collator(0)(examples(4, number))


WAYS = {
    "float32": Way(),
    "bfloat16": Way(torch.bfloat16, lambda model: random_selection(model, layers=[1, 2])),
    "as one": Way(torch.bfloat16, layers=False),
    "first rows": Way(select=lambda model: first(model, 3), optimizer=lambda m: SparseSGD(m, lr=0.1, momentum=0.9)),
    "categories": Way(select=lambda model: random_selection(model, units=2, forget=3), categories=True),
    "no masters": Way(optimizer=lambda model: SparseAdamW(model, lr=1e-2, master_weights=False)),
    "checkpointing": Way(torch.bfloat16, checkpointing=True),
    "reentrant": Way(select=lambda model: random_selection(model, layers=[1, 2]), checkpointing="reentrant"),
    "narrow": Way(torch.bfloat16, narrow=True),
    "mixture": Way(config=None, select=lambda model: random_selection(model, units=2)),
}


RANKS = {1: ("float32", "bfloat16"), 2: tuple(WAYS), 4: ("float32", "bfloat16", "first rows", "categories", "mixture")}
"""The ways that so many ranks take: two all of them, others those that depend on how many there are."""


def shard(model: Any, way: Way | None = None) -> None:
    """Every layer by itself, and the rest."""
    way = way or Way()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if way.narrow else None
    for layer in model.model.layers if way.layers else ():
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def run(way: Way, ranks: int, rank: int | None = None) -> tuple[Any, Sparse, SparseOptimizer]:
    """Trains a sharded model on one rank's batches; without a rank, one process on those of all, one after another."""
    model = way.model(shared=rank is not None)
    sparse = sparsify(model, way.select(model))
    if rank is not None:
        shard(model, way)
    if way.checkpointing == "reentrant":
        sparse.limit_checkpointing()
    optimizer = way.optimizer(model)
    for step in range(STEPS):
        for micro in range(ranks) if rank is None else [rank]:
            if way.categories:
                sparse.set_batch_layout(forget=0 if micro % 2 else 2, records=4, tokens=0)
            loss = model(**way.batch(step * ranks + micro)).loss
            (loss / ranks if rank is None else loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, sparse, optimizer


def result(model: Any, optimizer: SparseOptimizer) -> dict[str, Any]:
    """Every weight and the state of the optimizer, whole."""
    return {"weights": snapshot(model), "optimizer": optimizer.state_dict()}


def check_outside(way: Way, model: Any) -> None:
    """Everything outside the selection has the bits that it had."""
    before = way.model(shared=True)
    selection = way.select(before)
    inside = changed_inside(snapshot(before), model, selection)
    assert changed_outside(snapshot(before), model, selection) == 0 < inside


def footprint(rank: int) -> dict[str, int]:
    """What a rank has in the middle of a training, in bytes."""
    model = llama(torch.bfloat16, tie_word_embeddings=True)
    sparse = sparsify(model, spread(model, 4))
    shard(model)
    optimizer = SparseAdamW(model)
    model(**Collator(0)(examples(4, rank))).loss.backward()
    optimizer.step()
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    return {**sparse.memory_footprint(optimizer), "buffers": buffers}


@contextmanager
def refused(message: str, error: type[Exception] = SparseError) -> Iterator[None]:
    """Something inside is refused, with words that a rank of the outside would look for."""
    try:
        yield
    except error as caught:
        assert message in str(caught), caught
    else:
        raise AssertionError(f"not refused: {message}")


def original_and_moved(model: Any, sparse: Sparse, way: Way) -> None:
    """The model as it was, elsewhere and back; each rank swaps its own part."""
    trained, before = snapshot(model), snapshot(way.model())
    batch = way.batch(100)
    now = model(**batch).logits.detach()
    with sparse.original():
        assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
        assert torch.equal(model(**batch).logits, way.model()(**batch).logits)
        with refused("holds its original weights already"), sparse.original():
            pass
    with sparse.moved([torch.ones_like(values) for values in sparse.trainable_parameters]):
        moved = snapshot(model)
    selected = sum(int((moved[name] != tensor).sum()) for name, tensor in trained.items())
    assert selected == sum(one.leaf.numel() for one in sparse.slices)
    assert all(torch.equal(tensor, trained[name]) for name, tensor in snapshot(model).items())
    assert torch.equal(model(**batch).logits, now)


def gradients_of_all(model: Any, sparse: Sparse, optimizer: SparseOptimizer, way: Way, ranks: int, rank: int) -> None:
    """The norm for clipping is over all ranks, and what is not finite on one rank makes all skip the step."""
    whole = way.model()
    whole.load_state_dict({name: tensor for name, tensor in snapshot(model).items() if name in whole.state_dict()})
    alone = sparsify(whole, way.select(whole))
    for micro in range(ranks):
        (whole(**way.batch(50 + micro)).loss / ranks).backward()
    model(**way.batch(50 + rank)).loss.backward()
    expected = torch.nn.utils.clip_grad_norm_(alone.trainable_parameters, 0.01)
    torch.testing.assert_close(sparse.clip_grad_norm_(0.01), expected)
    for one, other in zip(sparse.slices, alone.slices, strict=True):
        torch.testing.assert_close(one.gather(one.values.grad), other.values.grad)
    before = snapshot(model)
    if rank == ranks - 1:  # the rows that the last one owns
        next(values for values in sparse.trainable_parameters if values.numel()).grad.fill_(torch.inf)
    logging.disable()
    optimizer.step()
    logging.disable(logging.NOTSET)
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
    optimizer.zero_grad()


def old_passes(model: Any, optimizer: SparseOptimizer, way: Way, rank: int) -> None:
    """A forward pass from before a step is not run backward with the weights from after it."""
    old = model(**way.batch(60 + rank)).loss
    model(**way.batch(70 + rank)).loss.backward()
    optimizer.step()
    with refused("modified by an inplace operation", RuntimeError):
        old.backward()


def saved(model: Any, sparse: Sparse) -> dict[str, Tensor]:
    """The plain checkpoint; loading another brings the values along, and loading it again brings them back."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )

    options = StateDictOptions(full_state_dict=True)
    state = {name: tensor.clone() for name, tensor in get_model_state_dict(model, options=options).items()}
    other = {name: tensor + 1 for name, tensor in state.items()}
    for loaded in (other, state):
        set_model_state_dict(model, dict(loaded), options=options)
        for trained in sparse.slices:
            assert torch.equal(trained.master(), trained.read().float())
            part = loaded[trained.path].index_select(trained.dim, trained.index)
            assert torch.equal(trained.gather(trained.master()), part.float())
    return state


def stochastic(rank: int, ranks: int) -> None:
    """Without masters weights are rounded at random, and nothing else changes."""
    way = Way(
        torch.bfloat16,
        optimizer=lambda model: SparseAdamW(model, lr=1e-4, master_weights=False, stochastic_rounding=True),
    )
    model, sparse, _ = run(way, ranks, rank)
    assert all(values.untyped_storage().nbytes() == 4 for values in sparse.trainable_parameters)
    check_outside(way, model)


def refusals(ranks: int) -> None:
    """What cannot be, by name; the model is as it was, and can be sharded after."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (ranks // 2, 2))
    model = llama()
    sparse = sparsify(model, random_selection(model))
    layer = model.model.layers[1]
    with refused("the mesh has 2 dimensions; give it one"):
        fully_shard(layer, mesh=mesh)
    with refused("model.layers.1.mlp.up_proj trains selected weights; shard the layer that holds it"):
        fully_shard(layer.mlp.up_proj)
    with refused("is in ignored_params, and trains"):
        fully_shard(layer, ignored_params=layer.parameters())
    with sparse.original(), refused("outside Sparse.original()"):
        fully_shard(layer)
    optimizer = SparseAdamW(model)
    model(**Collator(0)(examples(4))).loss.backward()
    with refused("has a gradient already; shard the model before the first backward pass"):
        fully_shard(layer)
    optimizer.step()
    optimizer.zero_grad()
    assert not any(hasattr(parameter, "placements") for parameter in model.parameters())
    assert all(trained.shard is None for trained in sparse.slices)
    shard(model)
    with refused("sharded already; load the model whole"):
        fully_shard(layer)
    model(**Collator(0)(examples(4))).loss.backward()
    with refused("was sharded after a step; make the optimizer after fully_shard"):
        optimizer.step()
    with refused("select anew before it is sharded"):
        sparse.reselect(sparse.selection)
    SparseAdamW(model).step()


def half_sharded() -> None:
    """A model of which one layer alone is sharded does not train, since the gradients of the others are not added."""
    model = llama()
    sparsify(model, random_selection(model))
    fully_shard(model.model.layers[1])
    model(**Collator(0)(examples(4))).loss.backward()
    with refused("model.layers.1.mlp.gate_proj.weight is sharded and model.layers.0.mlp.gate_proj.weight is not"):
        SparseAdamW(model).step()


def compiled(rank: int) -> None:
    """Whatever torch.compile makes of the layers, the exchange of gradients is the same."""
    found = []
    for compile in (False, True):
        model = llama(layers=1, **UNEVEN)
        sparse = sparsify(model, random_selection(model))
        shard(model)
        running = torch.compile(model, backend="eager") if compile else model
        running(**Collator(0)(examples(2, rank))).loss.backward()
        found.append([trained.values.grad for trained in sparse.slices])
    for gradient, its in zip(*found, strict=True):
        torch.testing.assert_close(its, gradient)


def restored(ranks: int, rank: int) -> None:
    """A model whose parts train no more is one that torch shards, all weights of which train."""
    model, sparse, _ = run(WAYS["float32"], ranks, rank)
    before = snapshot(model)
    sparse.restore()
    assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    model(**WAYS["float32"].batch(rank)).loss.backward()
    gradient = model.model.layers[0].mlp.up_proj.weight.grad
    assert gradient is not None and gradient.full_tensor().abs().sum() > 0


def start(rank: int, ranks: int, folder: Path, only: Sequence[str]) -> None:
    """Runs one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), ranks), rank=rank, world_size=ranks)
    if only:
        compiled(rank)
    else:
        train(rank, ranks, folder)
    dist.barrier()  # nobody ends while another still sends; the process ends without tearing threads of gloo down


def train(rank: int, ranks: int, folder: Path) -> None:
    """Trains one rank in every way, and has it try what is refused."""
    for name in RANKS[ranks]:
        way = WAYS[name]
        model, sparse, optimizer = run(way, ranks, rank)
        torch.save(result(model, optimizer), folder / f"{name} {rank}.pt")
        check_outside(way, model)
        if name == "float32":
            original_and_moved(model, sparse, way)
            gradients_of_all(model, sparse, optimizer, way, ranks, rank)
            state = saved(model, sparse)
            assert all(torch.equal(tensor, snapshot(model)[name]) for name, tensor in state.items())
            old_passes(model, optimizer, way, rank)
            sparse.revert()
            assert all(torch.equal(tensor, snapshot(way.model())[name]) for name, tensor in snapshot(model).items())
        if name == "first rows":
            assert all(one.values.numel() == 0 for one in sparse.slices if one.dim == 0) == (rank > 0)
    torch.save(footprint(rank), folder / f"footprint {rank}.pt")
    if ranks == 2:
        stochastic(rank, ranks)
        refusals(ranks)
        half_sharded()
        restored(ranks, rank)


def main(folder: Path, numbers: Sequence[int], *only: str) -> int:
    """Runs so many ranks one after another, all of which share what has been imported, until some fail."""
    faulthandler.enable()  # one that is aborted shows where it was
    for name in LATER:
        importlib.import_module(name)
    for ranks in numbers:
        (folder / str(ranks)).mkdir()
        if run_ranks(folder / str(ranks), ranks, only):
            return 1
    return 0


def run_ranks(folder: Path, ranks: int, only: Sequence[str]) -> bool:
    """Runs all ranks, and says whether one has failed, where it ends the others."""
    running = set()
    for rank in range(ranks):
        child = os.fork()
        if child:
            running.add(child)
            continue
        try:
            start(rank, ranks, folder, only)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        # Done: a thread of gloo that asks for the interpreter while it ends would abort the process.
        os._exit(0)
    failed = False
    while running:
        child, status = os.wait()
        running.discard(child)
        if status and not failed:
            failed = True
            for other in running:
                os.kill(other, signal.SIGKILL)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), list(map(int, sys.argv[2].split(","))), *sys.argv[3:]))
