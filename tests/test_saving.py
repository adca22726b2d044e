"""Nothing is lost at the end: what cannot be saved is named before training, and trained weights end up somewhere."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

import clue_fast
from clue_fast.demo.people import make_people, records_of
from clue_fast.demo.pretraining import train_tokenizer
from clue_fast.errors import ModelError, OutputError
from clue_fast.trainer import UnlearnTrainer
from clue_fast.trainer import checkpoints as saving

PEOPLE = make_people(5, seed=3)
FORGET, RETAIN = records_of(PEOPLE[:2])[:8], records_of(PEOPLE[2:])


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(FORGET + RETAIN, vocab_size=400)


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def unlearn(model: Any, tokenizer: PreTrainedTokenizerFast, output: Path, **settings: Any) -> clue_fast.UnlearnResult:
    defaults = {"epochs": 1, "batch_size": 8, "retain_ratio": 1, "forget_target": None, "progress": False}
    settings = defaults | settings
    return clue_fast.unlearn(model, tokenizer, forget=FORGET, retain=RETAIN, output_dir=output, **settings)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def contradict(model: LlamaForCausalLM) -> None:
    model.generation_config.num_return_sequences = 4  # of greedy decoding, which has one answer only


def share(model: LlamaForCausalLM) -> None:
    first, second = (layer.self_attn.q_proj for layer in model.model.layers)
    second.weight = first.weight


@pytest.mark.parametrize(("spoil", "named"), [(contradict, "num_return_sequences"), (share, "q_proj.weight")])
def test_a_model_that_cannot_be_saved_is_refused_before_training(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, spoil: Any, named: str
) -> None:
    spoil(model)
    with pytest.raises(Exception, match=named):
        model.save_pretrained(tmp_path / "stock")  # what would have happened at the end
    before = weights(model)
    with pytest.raises(ModelError, match=f"could not be saved after training: .*{named}"):
        unlearn(model, tokenizer, tmp_path / "out")
    assert same(weights(model), before)
    assert {path.name for path in tmp_path.iterdir()} <= {"stock"}


def test_a_tokenizer_that_cannot_be_saved_is_refused_before_training(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise TypeError("Object of type set is not JSON serializable")

    monkeypatch.setattr(tokenizer, "save_pretrained", broken, raising=False)
    with pytest.raises(ModelError, match="not JSON serializable"):
        unlearn(model, tokenizer, tmp_path / "out")


def test_a_disk_without_room_for_the_checkpoint_is_named_before_training(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(value.numel() * 4 for value in model.state_dict().values())
    assert saving.weight_bytes(model) == needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    with pytest.raises(OutputError, match="GB free; make room"):
        unlearn(model, tokenizer, tmp_path / "out")


def test_trying_out_a_save_changes_nothing(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    before = weights(model)
    saving.check_saving(model, tmp_path / "out", tokenizer)
    assert same(weights(model), before)
    assert not list(tmp_path.iterdir())


def test_weights_survive_an_error_while_the_results_are_written(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = weights(model)
    monkeypatch.setattr("clue_fast.run.save_json", full)
    with pytest.raises(OutputError, match="No space left on device") as raised:
        unlearn(model, tokenizer, tmp_path / "out", epochs=4)
    (folder,) = tmp_path.iterdir()
    assert str(folder) in str(raised.value)
    assert same(load_file(folder / "model.safetensors"), weights(model))
    assert not same(weights(model), before)
    assert torch.equal(
        LlamaForCausalLM.from_pretrained(folder).model.layers[0].mlp.up_proj.weight,
        model.model.layers[0].mlp.up_proj.weight,
    )


def test_plots_that_cannot_be_drawn_cost_nothing_else(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr("clue_fast.run.write_plots", broken)
    result = unlearn(model, tokenizer, tmp_path / "out")
    assert json.loads((result.output_dir / "results.json").read_text())["weights"]["changed_outside"] == 0
    assert "no font" in caplog.text


def test_one_step_trains(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Eight records, a batch of eight, one epoch: the warm-up must not be all there is."""
    assert len(FORGET) == 8
    result = unlearn(model, tokenizer, tmp_path / "out")
    weights = result.results["weights"]
    assert weights["changed_inside"] > 0.9 * weights["trained"]


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant_with_warmup", "inverse_sqrt"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_no_schedule_has_a_rate_of_0_at_every_step(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, scheduler: str, steps: int
) -> None:
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=steps,
        warmup_steps=3,
        lr_scheduler_type=scheduler,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    selection = clue_fast.localize(
        model, FORGET, RETAIN, tokenizer=tokenizer, criterion="random", fraction=0.5, progress=False
    )
    before = weights(model)
    trainer = UnlearnTrainer(
        model, arguments, tokenizer, forget_dataset=FORGET, retain_dataset=RETAIN, selection=selection
    )
    trainer.train()
    trainer.sparse.restore()
    assert not same(weights(model), before)
    assert trainer.args.warmup_steps == 3


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """Writes a Llama in the format of llama.cpp, weights in float32, queries and keys in its order of rotation."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    layer = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for number in range(config.num_hidden_layers):
        names |= {f"model.layers.{number}.{name}": f"blk.{number}.{short}" for name, short in layer.items()}
    for name, short in names.items():
        weight = model.get_submodule(name).weight.detach()
        if short.endswith(("attn_q", "attn_k")):
            heads = config.num_attention_heads
            weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{short}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_loaded_from_gguf_is_trained_and_saved(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_gguf(tmp_path / "model.gguf", model)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    loaded.generation_config.pad_token_id = tokenizer.pad_token_id
    tokens = torch.arange(12)[None]
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    result = unlearn(loaded, tokenizer, tmp_path / "out")
    stock = LlamaForCausalLM.from_pretrained(result.output_dir)
    assert torch.equal(stock(tokens).logits, loaded(tokens).logits)
    assert "quantization_config" not in json.loads((result.output_dir / "config.json").read_text())


def test_a_quantizer_that_holds_packed_weights_stays() -> None:
    model = torch.nn.Linear(4, 4)
    model.register_buffer("packed", torch.zeros(8, dtype=torch.uint8))
    model.hf_quantizer = SimpleNamespace()
    assert not saving.detach_quantizer(model)
    assert hasattr(model, "hf_quantizer")
