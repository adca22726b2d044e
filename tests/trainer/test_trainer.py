"""UnlearnTrainer, and SparseAdamW in the stock Trainer: what they train, log, save and resume."""

from __future__ import annotations

import copy
import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

from clue_fast.data import Collator
from clue_fast.errors import DataError, SelectionError, SparseError, UnknownNameError
from clue_fast.objectives import NPO, OBJECTIVES, RMU, passes
from clue_fast.sparse import SparseAdamW, SparseSGD, changed_inside, changed_outside, snapshot, sparsify
from clue_fast.sparse.slices import trainable_slices
from clue_fast.trainer import UnlearnTrainer
from clue_fast.trainer.pairing import PairCollator, PairedRecords, PairSampler
from tests.models.families import make_model as make_family
from tests.sparse.test_families import some_units


class Gradients(TrainerCallback):
    """Remembers the gradients right before the first optimizer step, in one vector."""

    def __init__(self) -> None:
        self.vector: Any = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if self.vector is None:
            self.vector = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone()


@pytest.fixture
def make_trainer(make_model, make_selection, make_arguments, make_examples):
    def make(model: Any = None, selection: Any = None, settings: Any = None, **kwargs: Any) -> UnlearnTrainer:
        model = make_model() if model is None else model
        return UnlearnTrainer(
            model,
            make_arguments(**settings or {}),
            forget_dataset=kwargs.pop("forget", make_examples(10, seed=1)),
            retain_dataset=kwargs.pop("retain", make_examples(7, seed=2)),
            selection=make_selection(model) if selection is None else selection,
            **kwargs,
        )

    return make


def objective_reaches(objective: Any, layer: int) -> bool:
    return not isinstance(objective, RMU) or layer <= objective.layer


@pytest.mark.parametrize(
    ("dtype", "objective"), [(torch.float32, "npo"), *((torch.bfloat16, name) for name in sorted(OBJECTIVES))]
)
def test_trains_the_selection_only_and_logs_its_terms(
    dtype, objective, make_model, make_selection, make_trainer, make_examples
):
    model = make_model(dtype)
    selection, before = make_selection(model), snapshot(model)
    settings = {"num_train_epochs": 9, "per_device_train_batch_size": 10, "weight_decay": 0.1}
    if objective == "rmu":
        objective = RMU(layer=1, retain_weight=10.0)
    sets = {"retain": make_examples(10, seed=2), "alternate_dataset": make_examples(10, seed=3)}
    trainer = make_trainer(model, selection, settings, objective=objective, **sets)
    trainer.train()
    assert changed_outside(before, model, selection) == 0
    reached = [p.values for p in trainer.sparse.slices if objective_reaches(trainer.objective, p.layer)]
    assert changed_inside(before, model, selection) > 0.9 * sum(p.numel() for p in reached)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 9
    weight = trainer.objective.retain_weight
    for entry in logs:
        assert ("retain_loss" in entry) == (weight > 0)
        expected = entry["forget_loss"] + weight * entry.get("retain_loss", 0.0)
        assert entry["loss"] == pytest.approx(expected, rel=1e-3)
        assert entry["skipped_steps"] == 0
    if trainer.objective.name in ("gradient_ascent", "gradient_difference", "npo", "kl"):
        assert logs[-1]["forget_nll"] > logs[0]["forget_nll"]  # the others have little to forget in a random model
    else:
        assert logs[-1]["loss"] < logs[0]["loss"]


@pytest.mark.parametrize("stochastic", [False, True])
def test_resume_gives_the_same_bits(stochastic, make_model, make_selection, make_trainer):
    """Interrupted in the middle of the second epoch, in bf16, where the weights alone would not do."""
    settings = {"num_train_epochs": 3, "save_strategy": "steps", "save_steps": 4, "weight_decay": 0.1}
    model = make_model(torch.bfloat16)
    selection, before = make_selection(model), snapshot(model)
    twin = copy.deepcopy(model)
    straight = make_trainer(model, selection, settings, master_weights=not stochastic, stochastic_rounding=stochastic)
    straight.train()
    resumed = make_trainer(twin, selection, settings, master_weights=not stochastic, stochastic_rounding=stochastic)
    resumed.train(resume_from_checkpoint=str(Path(straight.args.output_dir) / "checkpoint-4"))
    assert straight.state.global_step == resumed.state.global_step == 9
    assert changed_outside(before, twin, selection) == 0
    assert all(torch.equal(now, snapshot(twin)[name]) for name, now in snapshot(model).items())
    for one, other in zip(straight.sparse.trainable_parameters, resumed.sparse.trainable_parameters, strict=True):
        assert torch.equal(one, other)
    keys = ("loss", "forget_loss", "forget_nll", "retain_loss", "grad_norm", "learning_rate", "epoch")
    for one, other in zip(straight.state.log_history[:9], resumed.state.log_history[:9], strict=True):
        assert [one[key] for key in keys] == [other[key] for key in keys]


def test_is_a_function_of_the_seed(make_model, make_trainer):
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(torch.seed())  # whatever the state of the global generator
        trainer = make_trainer(make_model(), settings={"seed": seed, "num_train_epochs": 2})
        torch.rand(seed + 1)
        trainer.train()
        return torch.cat([part.master().flatten() for part in trainer.sparse.slices])

    assert torch.equal(weights(3), weights(3))
    assert not torch.equal(weights(3), weights(4))


def test_checkpoint_is_plain(make_model, make_trainer, make_batch, tmp_path):
    model, batch = make_model(), make_batch()
    trainer = make_trainer(model)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded, report = LlamaForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
    assert loaded.config.use_cache and model.config.use_cache
    for file in (tmp_path / "saved").iterdir():
        assert b"clue_fast" not in file.read_bytes(), file
    trainer.sparse.restore()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_accumulation_equals_the_larger_batch(make_model, make_trainer, make_examples):
    """To the rounding of a sum over some hundred tokens in float32: 100 * 2 ** -23."""
    found = []
    for batch, accumulation in ((8, 1), (2, 4)):
        callback = Gradients()
        settings = {
            "per_device_train_batch_size": batch,
            "gradient_accumulation_steps": accumulation,
            "max_steps": 1,
        }
        make_trainer(settings=settings, callbacks=[callback], forget=make_examples(8, seed=1)).train()
        found.append(callback.vector)
    assert (found[0] - found[1]).norm() < 1.2e-5 * found[0].norm()


def test_last_accumulation_of_an_epoch_may_be_short(make_trainer):
    trainer = make_trainer(settings={"gradient_accumulation_steps": 2, "num_train_epochs": 1})
    trainer.train()  # 10 records in batches of 4: 8, then 2
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant, make_model, make_selection, make_trainer, one_pass):
    """The same gradients, and still no backward below the lowest selected layer."""
    found = []  # in one pass without checkpointing too, so that both have the same bits
    for checkpointing in (False, True):
        callback, model = Gradients(), make_model(layers=4)
        settings = {
            "max_steps": 1,
            "gradient_checkpointing": checkpointing,
            "gradient_checkpointing_kwargs": {"use_reentrant": reentrant} if checkpointing else None,
        }
        reached: list[bool] = []
        for layer in model.model.layers:
            layer.register_forward_hook(lambda _, __, out, reached=reached: reached.append(out.requires_grad))
        make_trainer(model, make_selection(model, layers=[2, 3]), settings, callbacks=[callback]).train()
        assert reached[-4:] == [False, False, True, True]
        found.append(callback.vector)
    assert torch.equal(*found)


def test_tied_embeddings_stay_tied(make_model, make_selection, make_trainer, make_batch, tmp_path):
    model, batch = make_model(tie_word_embeddings=True), make_batch()
    selection, before = make_selection(model), snapshot(model)
    trainer = make_trainer(model, selection)
    trainer.train()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert changed_outside(before, model, selection) == 0 < changed_inside(before, model, selection)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"fsdp_plugin": object()},
            "a Trainer with FSDP shards the weights .* train with DistributedDataParallel, or .*sparse.fully_shard",
        ),
        ({"deepspeed_plugin": object()}, "DeepSpeed ZeRO shards the weights .* train with DistributedDataParallel"),
        ({"n_gpu": 2}, "DataParallel copies the model .*torchrun or accelerate launch"),
    ],
)
def test_refuses_what_shards_or_copies_the_weights(
    state, message, make_model, make_selection, make_trainer, monkeypatch
):
    """By name, with what to do instead, and the model is as it was."""

    def create_accelerator(self: Any) -> None:
        create(self)
        self.is_fsdp_enabled, self.is_deepspeed_enabled = "fsdp_plugin" in state, "deepspeed_plugin" in state

    create = Trainer.create_accelerator_and_postprocess
    monkeypatch.setattr(Trainer, "create_accelerator_and_postprocess", create_accelerator)
    model = make_model()
    selection = make_selection(model)
    if "n_gpu" in state:
        monkeypatch.setattr("transformers.TrainingArguments.n_gpu", property(lambda _: 2))
    with pytest.raises(SparseError, match=message):
        make_trainer(model, selection)
    assert not list(trainable_slices(model)) and all(p.requires_grad for p in model.parameters())


def test_memory_is_counted_at_the_first_step(make_trainer):
    trainer = make_trainer()
    trainer.train()
    trained = sum(p.nbytes for p in trainer.sparse.trainable_parameters)
    assert trainer.memory["gradients"] == trained
    assert trainer.memory["values"] == 0  # the weights, in float32, hold them
    assert trainer.memory["optimizer_state"] == 2 * trained
    assert trained < 0.1 * trainer.memory["weights"]


def test_optimizer_has_the_arguments_of_the_trainer(make_trainer):
    settings = {"learning_rate": 3e-4, "adam_beta1": 0.8, "adam_beta2": 0.98, "adam_epsilon": 1e-7, "weight_decay": 0.2}
    optimizer = make_trainer(settings=settings, layer_lr=0.5).create_optimizer()
    assert isinstance(optimizer, SparseAdamW)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([3e-4, 3e-4 * 0.5**0.5, 1.5e-4])
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.98), 1e-7, 0.2)


def test_sgd_and_what_there_is_not(make_model, make_selection, make_trainer):
    model = make_model()
    selection, before = make_selection(model), snapshot(model)
    trainer = make_trainer(model, selection, {"optim": "sgd", "optim_args": "momentum=0.9", "weight_decay": 0.1})
    trainer.train()
    assert isinstance(trainer.inner_optimizer, SparseSGD)
    assert all((g["momentum"], g["weight_decay"]) == (0.9, 0.1) for g in trainer.inner_optimizer.param_groups)
    assert changed_outside(before, model, selection) == 0 < changed_inside(before, model, selection)
    for settings, message in (
        ({"optim": "adafactor"}, "optim='adafactor' cannot train selected weights; use adamw_torch or sgd"),
        ({"optim": "sgd", "optim_args": "nesterov=1"}, "optim_args sets nesterov, SparseSGD knows momentum only"),
    ):
        with pytest.raises(SparseError, match=message):
            make_trainer(make_model(), settings=settings).create_optimizer()


def test_clips_by_the_norm_of_the_selected_part(make_trainer):
    callback = Gradients()
    trainer = make_trainer(settings={"max_steps": 1, "max_grad_norm": 1e-3}, callbacks=[callback])
    trainer.train()
    assert callback.vector.numel() == sum(p.numel() for p in trainer.sparse.trainable_parameters)
    assert float(callback.vector.norm()) == pytest.approx(1e-3, rel=1e-4)


def test_steps_that_are_not_finite_are_logged_and_skipped(make_trainer):
    trainer = make_trainer(objective=NPO(retain_weight=float("inf")), settings={"max_steps": 2})
    before = snapshot(trainer.model)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["skipped_steps"] for entry in logs] == [1, 2]
    assert not math.isfinite(logs[0]["loss"])
    assert all(torch.equal(before[name], now) for name, now in snapshot(trainer.model).items())


def test_evaluates_plain_examples(make_trainer, make_examples):
    trainer = make_trainer(eval_dataset=make_examples(5, seed=3))
    assert math.isfinite(trainer.evaluate()["eval_loss"])


def test_sequence_to_sequence_with_a_collator_of_its_own(make_arguments):
    """T5 on encoded pairs: what is padded how is known to the data_collator."""
    model = make_family("t5 gated")
    selection, before = some_units(model, ("mlp",)), snapshot(model)
    generator = random.Random(0)

    def pairs(count: int) -> list[dict[str, list[int]]]:
        return [
            {name: [generator.randrange(3, 90) for _ in range(generator.randrange(3, 8))] for name in names}
            for names in [("input_ids", "labels")] * count
        ]

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        padded = {
            name: torch.nn.utils.rnn.pad_sequence([torch.tensor(e[name]) for e in examples], True, padding)
            for name, padding in (("input_ids", 0), ("labels", -100))
        }
        return {**padded, "attention_mask": (padded["input_ids"] > 0).long()}

    trainer = UnlearnTrainer(
        model,
        make_arguments(num_train_epochs=3, per_device_train_batch_size=8),
        forget_dataset=pairs(8),
        retain_dataset=pairs(8),
        selection=selection,
        objective="npo",
        data_collator=collate,
    )
    trainer.train()
    assert changed_outside(before, model, selection) == 0 < changed_inside(before, model, selection)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_stock_trainer(make_model, make_selection, make_arguments, make_examples, tmp_path):
    """A plain Trainer with SparseAdamW trains, clips, saves and resumes like UnlearnTrainer."""
    settings = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 3, "max_grad_norm": 1e-3}
    finals = []
    for resume in (None, str(tmp_path / "run" / "checkpoint-3")):
        model = make_model(torch.bfloat16)
        selection, before = make_selection(model), snapshot(model)
        sparse = sparsify(model, selection)
        callback = Gradients()
        trainer = Trainer(
            model,
            make_arguments(**settings),
            train_dataset=make_examples(10),
            data_collator=Collator(0),
            optimizers=(SparseAdamW(model, lr=1e-3, layer_lr=0.2, weight_decay=0.1), None),
            callbacks=[callback],
        )
        trainer.train(resume_from_checkpoint=resume)
        assert float(callback.vector.norm()) == pytest.approx(1e-3, rel=1e-4)
        assert callback.vector.numel() == sum(p.numel() for p in sparse.trainable_parameters)
        assert changed_outside(before, model, selection) == 0 < changed_inside(before, model, selection)
        finals.append(snapshot(model))
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])
    assert "learning_rate" in trainer.state.log_history[0]


@pytest.mark.parametrize("ratio", [1, 4])
def test_pairs_use_every_record_before_any_comes_again(ratio):
    sampler = PairSampler(10, 7, seed=5, ratio=ratio)
    pairs = []
    for epoch in range(7):
        sampler.epoch = epoch
        drawn = list(sampler)
        assert sorted(forget for forget, _ in drawn) == list(range(10))
        assert all(len(retain) == ratio for _, retain in drawn)
        assert drawn == list(sampler) and len(drawn) == len(sampler)
        pairs += drawn
    retain = [one for _, beside in pairs for one in beside]
    for start in range(0, 70 * ratio, 7):
        assert sorted(retain[start : start + 7]) == list(range(7))
    assert Counter(retain) == dict.fromkeys(range(7), 10 * ratio)
    assert [f for f, _ in pairs[:10]] != [f for f, _ in pairs[10:20]]
    assert pairs[:10] != list(PairSampler(10, 7, seed=6, ratio=ratio))


def test_collator_keeps_the_sides_apart(make_examples):
    forget, retain = make_examples(3, seed=1), make_examples(3, seed=2)
    paired = PairedRecords(forget, retain)
    batch = PairCollator(Collator(9))([paired[2, (0, 2)], paired[0, (1, 0)]])
    assert set(batch) == {"forget", "retain"}
    longest = max(len(forget[i]["input_ids"]) for i in (2, 0))
    assert batch["forget"]["input_ids"].shape == (2, longest)
    assert batch["forget"]["input_ids"][0, : len(forget[2]["input_ids"])].tolist() == forget[2]["input_ids"]
    for row, i in enumerate((0, 2, 1, 0)):
        labels = retain[i]["labels"]
        assert batch["retain"]["labels"][row, : len(labels)].tolist() == labels


def test_a_refused_trainer_leaves_nothing_behind(make_model, make_selection, make_trainer, make_examples, tmp_path):
    model = make_model()
    same = make_examples(3)
    cases = [
        ({"objective": "ga"}, UnknownNameError, "unknown objective"),
        ({"forget": same, "retain": list(same)}, DataError, "equals the retain set"),
        ({"forget": same, "retain": make_examples(4, seed=5) + same[:2]}, DataError, "2 of the 3 forget records"),
        ({"forget": []}, DataError, "forget set is empty"),
        ({"retain": [{"prompt": "a", "completion": "b"}]}, DataError, "processing_class"),
        ({"objective": "dpo"}, DataError, "encoded already"),
        ({"objective": "dpo", "alternate_dataset": same}, DataError, "3 alternate answers to 10 forget records"),
        ({"retain": [{**same[0], "token_type_ids": [0]}]}, DataError, "retain set holds input_ids.*data_collator"),
        ({"selection": make_selection(make_model(seed=1))}, SelectionError, "belongs to the model"),
        ({"no_such_argument": 1}, TypeError, "no_such_argument"),
    ]
    for wrong, error, message in cases:
        with pytest.raises(error, match=message):
            make_trainer(model, **wrong)
        assert not list(trainable_slices(model))
        assert all(p.requires_grad for p in model.parameters())
    assert not (tmp_path / "run").exists()


def test_arguments_of_the_user_are_not_touched(make_model, make_selection, make_arguments, make_examples):
    args, model = make_arguments(), make_model()
    before = args.to_json_string()
    UnlearnTrainer(
        model,
        args,
        forget_dataset=make_examples(2, seed=1),
        retain_dataset=make_examples(2, seed=2),
        selection=make_selection(model),
    )
    assert args.to_json_string() == before


@pytest.mark.parametrize("objective", ["undial", "simnpo"])
def test_passes_run_backward_one_by_one_train_as_one_graph(objective, make_trainer, monkeypatch):
    """With micro-batches that are accumulated, and gradients that are clipped."""
    monkeypatch.setattr(passes, "PASS_TOKENS", {"cpu": 0, "cuda": 0})
    settings = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "max_grad_norm": 0.1}
    weights, logs = [], []
    for by_pass in (True, False):
        trainer = make_trainer(settings=settings, objective=objective)
        assert trainer.sparse.backward_by_pass
        trainer.sparse.backward_by_pass = by_pass
        trainer.train()
        weights.append(torch.cat([trained.master().flatten() for trained in trainer.sparse.slices]))
        logs.append([entry for entry in trainer.state.log_history if "loss" in entry])
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
    for apart, one in zip(*logs, strict=True):
        for name in ("loss", "forget_loss", "forget_nll", "retain_loss", "grad_norm"):
            assert apart[name] == pytest.approx(one[name], rel=1e-3)


def test_one_graph_where_gradients_are_scaled(make_trainer, monkeypatch):
    def scaled(self: Any) -> None:
        create(self)
        self.accelerator.scaler = object()

    create = UnlearnTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(UnlearnTrainer, "create_accelerator_and_postprocess", scaled)
    assert not make_trainer().sparse.backward_by_pass
