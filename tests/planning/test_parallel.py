"""What several GPUs share: parts of weights as FSDP2 cuts them, launch lines, and what is refused."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate.commands.launch import launch_command_parser
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.run import get_args_parser
from torch.testing._internal.distributed.fake_pg import FakeStore

from clue_fast import cli
from clue_fast.planning.depth import find_depth
from clue_fast.planning.engines import localization_engine, training_engine
from clue_fast.planning.parallel import weights_of
from tests.planning.test_step import of


@pytest.fixture(params=[2, 3, 8])
def world(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many processes, of which this is the first and no other exists."""
    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=request.param)
    yield request.param
    distributed.destroy_process_group()


def test_parts_of_weights_are_those_of_fsdp2(world, make_small):
    model = make_small(torch.bfloat16, hidden_size=40, num_attention_heads=4, vocab_size=101)
    weights = weights_of(model, find_depth(model))
    mesh = init_device_mesh("cpu", (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    kept = sum(p.to_local().nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert weights.sharded(world) == kept < weights.total
    assert weights.root == 2 * (101 * 40 + 40)  # tied embeddings, and the norm
    assert weights.largest == 2 * (40 * (40 + 20 + 20 + 40) + 3 * 40 * 512 + 2 * 40)


def test_what_gpus_share(make_small, make_plan):
    """Whole models side by side have buckets of gradients beside; parts of weights, the whole ones of two layers."""
    model = make_small(layers=3)
    records = {"forget_records": 64, "objective": "simnpo"}
    one, ddp, fsdp2 = (
        make_plan(model, ["all weights", "LoRA, r=16"], gpus=gpus, parallel=parallel, **records)
        for gpus, parallel in ((1, "ddp"), (8, "ddp"), (8, "fsdp2"))
    )
    for name in ("selected units", "all weights", "LoRA, r=16"):
        alone, beside, shared = (of(plan, name) for plan in (one, ddp, fsdp2))
        gradients = alone.footprint.gradients
        assert beside.footprint.peak == alone.footprint.peak + gradients
        assert (beside.footprint.communication, beside.sent) == (gradients, 2 * 7 * gradients // 8)
        assert beside.flop == shared.flop == 8 * alone.flop
        assert shared.footprint.gradients == -(-gradients // 8)
        assert shared.footprint.optimizer_state == -(-alone.footprint.optimizer_state // 8)
        assert alone.footprint.weights / 8 < shared.footprint.weights < alone.footprint.weights / 7.5
        layer, root = 4 * (128 * (128 + 2 * 64 + 128) + 3 * 128 * 512 + 2 * 128), 4 * (512 * 128 + 128)
        assert shared.footprint.communication == 2 * layer + root
        assert shared.sent == 7 * (2 * alone.footprint.weights + gradients) // 8
        assert shared.footprint.activations == alone.footprint.activations


def test_the_peak_with_gradients_that_are_given_away(make_small, make_plan):
    """Where gradients outweigh what the forward pass keeps, they make the peak; cut in eight they do not.

    One GPU then has at its end all gradients; with FSDP2 an eighth of those of the layers, and one layer's whole.
    """
    model = make_small()
    few = {"forget_records": 8, "objective": "gradient_ascent", "max_length": 4, "answer_tokens": 2, "batch_size": 1}
    one = of(make_plan(model, ["all weights"], **few), "all weights").footprint
    many = of(make_plan(model, ["all weights"], gpus=8, parallel="fsdp2", **few), "all weights").footprint
    assert one.gradients > 10 * one.activations
    layer = 4 * (128 * (128 + 2 * 64 + 128) + 3 * 128 * 512 + 2 * 128)
    head = 4 * (512 * 128 + 128)
    constant = many.weights + many.optimizer_state + many.communication
    assert many.peak - constant == pytest.approx(6 * layer / 8 + head + layer, rel=0.25)
    assert one.peak > one.weights + one.optimizer_state + 6 * layer + head


def test_float32_weights_that_are_gathered_in_less(make_small, make_plan):
    """Parts in float32, whole layers in bfloat16, of which autocast then makes no copies."""
    model = make_small(torch.bfloat16, layers=3)
    settings = {"forget_records": 64, "objective": "simnpo", "parallel": "fsdp2"}
    one, many = (make_plan(model, ["all weights", "all, float32"], gpus=gpus, **settings) for gpus in (1, 8))
    narrow, wide = (of(many, name).footprint for name in ("all weights", "all, float32"))
    assert wide.communication == narrow.communication and wide.gradients == 2 * narrow.gradients
    assert wide.weights - narrow.weights == pytest.approx(narrow.weights, rel=0.01)  # but for buffers
    copies = 2 * sum(p.numel() for p in model.parameters())
    assert narrow.activations <= wide.activations < of(one, "all, float32").footprint.activations - 0.9 * copies


def launched(line: str) -> Any:
    words = shlex.split(line.replace("RANK", "0"))
    assert words[:2] == ["accelerate", "launch"]
    return launch_command_parser().parse_args(words[2:])


@pytest.mark.parametrize("gpus", [2, 8, 16, 64])
def test_launch_lines_are_those_of_accelerate(gpus):
    ddp = launched(training_engine("unlearn", gpus, "ddp", True, "LlamaDecoderLayer").launch)
    assert (ddp.num_processes, ddp.multi_gpu, ddp.use_fsdp) == (gpus, True, False)
    assert ddp.num_machines == max(1, gpus // 8) and ddp.training_script == "train.py"
    line = training_engine(None, gpus, "fsdp2", False, "LlamaDecoderLayer", "bf16").launch
    fsdp2 = launched(line)
    assert (fsdp2.use_fsdp, fsdp2.fsdp_version, fsdp2.mixed_precision) == (True, "2", "bf16")
    assert fsdp2.fsdp_transformer_layer_cls_to_wrap == "LlamaDecoderLayer"
    words = shlex.split(training_engine("unlearn", gpus, "fsdp2", True, "LlamaDecoderLayer").launch)
    loop = get_args_parser().parse_args([word.replace("RANK", "0") for word in words[1:]])
    assert words[0] == "torchrun" and loop.training_script == "loop.py"
    assert int(loop.nproc_per_node) * int(loop.nnodes.split(":")[-1]) == gpus
    record = launched(localization_engine("localize", gpus, "fsdp2", "difference", True).launch)
    assert record.training_script == "record.py"


def test_what_is_refused():
    assert (
        "one process alone measures the criterion 'fisher'"
        in localization_engine("", 2, "ddp", "fisher", False).refused
    )


def test_commands_are_those_of_the_command(make_small, make_plan):
    """With every setting that is not a default."""
    plan = make_plan(make_small(), criterion="difference", kinds=("mlp", "expert"), fraction={"mlp": 0.2}, seed=3)
    for name, engine in (("localize", plan.localization_engine), ("unlearn", plan.trainings[0].engine)):
        words = shlex.split(engine.launch)
        options = cli._parser(words[1:]).parse_args(words[1:])
        assert words[:3] == ["clue-fast", name, plan.name]
        assert (options.criterion, options.kinds, options.fraction) == (
            "difference",
            ("mlp", "expert"),
            {"mlp": 0.2},
        )
        assert (options.max_length, options.seed, options.dtype) == (32, 3, "float32")
    assert (options.batch_size, options.retain_ratio) == (3, 2)
