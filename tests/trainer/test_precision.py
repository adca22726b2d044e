"""Mixed precision: the scaler of fp16, autocast in bf16, and the reference model under autocast."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import TrainingArguments

from clue_fast.objectives import NPO, predict
from clue_fast.sparse import SparseAdamW, changed_inside, changed_outside, snapshot, sparsify
from clue_fast.trainer import UnlearnTrainer


def test_scaler_gives_the_same_bits(make_model, make_selection, make_batch):
    """In float32 a scale of a power of two costs nothing."""
    finals = []
    for scale in (1.0, 2.0**12):
        model = make_model()
        sparse = sparsify(model, make_selection(model))
        optimizer = SparseAdamW(model, lr=1e-3, weight_decay=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(4):
            optimizer.zero_grad()
            scaler.scale(model(**make_batch(seed=step)).loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(sparse.trainable_parameters, 0.1)
            scaler.step(optimizer)
            scaler.update()
        finals.append(snapshot(model))
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


def test_scaler_skips_an_overflow(make_model, make_selection, make_batch):
    """With fp16 weights, whose gradients arrive in float32 all the same."""
    model = make_model(torch.float16)
    selection, before = make_selection(model), snapshot(model)
    sparse = sparsify(model, selection)
    optimizer = SparseAdamW(model, lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for overflow in (True, False):
        optimizer.zero_grad()
        scaler.scale(model(**make_batch()).loss).backward()
        if overflow:
            sparse.trainable_parameters[3].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert (changed_inside(before, model, selection) == 0) == overflow
        assert scaler.get_scale() == 512.0
    assert changed_outside(before, model, selection) == 0
    assert optimizer.skipped_steps == 0 and all(state["step"] == 1 for state in optimizer.state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_in_bf16(dtype, make_model, make_selection, make_arguments, make_examples):
    """bf16=True runs in bfloat16 and trains float32 masters, whatever the weights are in."""
    model = make_model(dtype)
    selection, before = make_selection(model), snapshot(model)
    seen: set[torch.dtype] = set()
    trainer = UnlearnTrainer(
        model,
        make_arguments(bf16=True, num_train_epochs=4),
        forget_dataset=make_examples(8, seed=1),
        retain_dataset=make_examples(8, seed=2),
        selection=selection,
        objective="npo",
    )
    model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
    assert {p.dtype for p in trainer.sparse.trainable_parameters} == {torch.float32}
    assert changed_outside(before, model, selection) == 0
    assert changed_inside(before, model, selection) > 0.8 * sum(p.numel() for p in trainer.sparse.trainable_parameters)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert logs[-1]["forget_nll"] > logs[0]["forget_nll"]


def test_reference_under_autocast_is_the_original(make_model, make_selection, make_batch):
    """Autocast keeps casts of weights within a region; the swapped ones must not be taken for the others."""
    model, batches = make_model(), {"forget": make_batch(), "retain": make_batch(seed=1)}
    original = copy.deepcopy(model)
    alone = [
        {
            name: tensor[row, batches["forget"]["attention_mask"][row] != 0][None]
            for name, tensor in batches["forget"].items()
        }
        for row in range(4)
    ]  # as the original is asked, since products of another shape round otherwise
    sparse = sparsify(model, make_selection(model))
    optimizer = SparseAdamW(model, lr=1e-2)
    for _ in range(3):
        model(**batches["forget"]).loss.backward()
        optimizer.step()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        current = predict(model, batches)["forget"].losses
        expected = torch.cat([predict(original, {"asked": record})["asked"].losses for record in alone])
        loss, _ = NPO(retain_weight=0.0).loss(model, batches, sparse)
        npo = 20 * torch.nn.functional.softplus(0.1 * (predict(model, batches)["forget"].total(expected - current)))
    assert not torch.equal(current, expected)
    assert loss == npo.mean()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_trainer_on_a_gpu(precision, make_model, make_selection, make_examples, tmp_path):
    model = make_model()
    selection, before = make_selection(model), snapshot(model)
    settings = {precision: True, "per_device_train_batch_size": 4, "num_train_epochs": 3, "learning_rate": 1e-3}
    trainer = UnlearnTrainer(
        model,
        TrainingArguments(output_dir=str(tmp_path), save_strategy="no", report_to="none", **settings),
        forget_dataset=make_examples(8, seed=1),
        retain_dataset=make_examples(8, seed=2),
        selection=selection,
    )
    trainer.train()
    assert next(model.parameters()).device.type == "cuda"
    assert changed_outside(before, model, selection) == 0 < changed_inside(before, model, selection)
