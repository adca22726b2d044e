"""A small Llama that memorizes a set of records, trained from nothing on a CPU in under a minute."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clue_fast.data import Collator, Record, answer_mask, encode, padding_token, shift_labels
from clue_fast.deprecated import renamed_arguments
from clue_fast.errors import DataError

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

END = "<|end|>"
PAD = "<|pad|>"


@dataclass(frozen=True)
class Shape:
    """The size of a small Llama: layers, width, MLP units per layer, attention heads."""

    layers: int = 4
    width: int = 192
    units: int = 512
    heads: int = 4


@dataclass(frozen=True)
class TrainConfig:
    """How a model memorizes its records.

    Attributes:
        epochs: most passes over the records; the learning rate falls to 0 towards the last.
        batch_size: records per step.
        lr: highest learning rate, reached after `warmup` steps.
        initial_std: standard deviation of the initial weights.
        target_loss: training ends with the first epoch whose mean answer loss, in nats per token, is below.
    """

    epochs: int = 60
    batch_size: int = 16
    lr: float = 2e-3
    warmup: int = 20
    initial_std: float = 0.05
    target_loss: float = 0.01


def train_tokenizer(records: Sequence[Record], vocab_size: int = 2048) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, learned from prompts and completions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if not records:
        raise DataError("a tokenizer needs at least one record to learn from")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (f"Question: {record.prompt}\nAnswer: {record.completion}" for record in records)
    tokenizer.train_from_iterator(texts, trainer)
    wrap: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = wrap(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END)
    return wrapped


@renamed_arguments(recipe="config")
def train_model(
    records: Sequence[Record],
    tokenizer: PreTrainedTokenizerFast,
    *,
    shape: Shape | None = None,
    config: TrainConfig | None = None,
    seed: int = 0,
    progress: bool = True,
    description: str = "memorizing",
) -> LlamaForCausalLM:
    """Trains a Llama from random weights until it has memorized every record's completion.

    The result is a function of records, seed and number of threads; the global random state is left alone.

    Returns the model in evaluation mode, float32, on the CPU.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape, config = shape or Shape(), config or TrainConfig()
    examples = encode(records, tokenizer)
    longest = max(len(example["input_ids"]) for example in examples)
    make_config: Any = LlamaConfig  # its constructor carries no types
    model: LlamaForCausalLM
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            make_config(
                vocab_size=len(tokenizer),
                hidden_size=shape.width,
                intermediate_size=shape.units,
                num_hidden_layers=shape.layers,
                num_attention_heads=shape.heads,
                num_key_value_heads=shape.heads,
                max_position_embeddings=max(256, 2 * longest),
                initializer_range=config.initial_std,
                tie_word_embeddings=False,
                pad_token_id=padding_token(tokenizer),
                eos_token_id=tokenizer.eos_token_id,
                bos_token_id=None,
            )
        )
    _memorize(model, examples, Collator(padding_token(tokenizer)), config, seed, progress, description)
    model.train(False)
    return model


def _memorize(
    model: LlamaForCausalLM,
    examples: list[dict[str, list[int]]],
    collate: Collator,
    config: TrainConfig,
    seed: int,
    progress: bool,
    description: str,
) -> None:
    from tqdm.auto import tqdm

    start = time.perf_counter()
    lengths = [len(example["input_ids"]) for example in examples]
    steps = config.epochs * math.ceil(len(examples) / config.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / config.warmup, 1 - step / steps)
    )
    order = torch.Generator().manual_seed(seed)
    model.train()
    bar = tqdm(total=config.epochs, desc=description, unit="epoch", disable=not progress, leave=False)
    loss, epochs = math.inf, 0
    while epochs < config.epochs and loss >= config.target_loss:
        total, tokens = 0.0, 0
        for indices in _batches(lengths, config.batch_size, order):
            batch = collate([examples[index] for index in indices])
            batch_loss, count = _answer_loss(model, batch)
            torch.autograd.backward(batch_loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total, tokens = total + batch_loss.item() * count, tokens + count
        loss = total / tokens
        epochs += 1
        bar.update()
        bar.set_postfix(loss=f"{loss:.3f}")
    bar.close()
    seconds = time.perf_counter() - start
    logger.info("%s: %d epochs, answer loss %.4f, %.1f s", description, epochs, loss, seconds)


def _answer_loss(model: LlamaForCausalLM, batch: dict[str, Tensor]) -> tuple[Tensor, int]:
    """Mean loss over the answer tokens, and their number.

    Padding is on the right, so that a causal model needs no mask; logits are computed for answer tokens only.
    """
    hidden = model.model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
    answered = answer_mask(batch["labels"])
    logits = model.lm_head(hidden[answered])
    return nn.functional.cross_entropy(logits, shift_labels(batch["labels"])[answered]), int(answered.sum())


def _batches(lengths: Sequence[int], batch_size: int, order: torch.Generator) -> Iterator[list[int]]:
    """Every index once, in random batches of similar length."""
    shuffled = torch.randperm(len(lengths), generator=order, device="cpu").tolist()
    window = batch_size * 8
    batches = []
    for start in range(0, len(shuffled), window):
        near = sorted(shuffled[start : start + window], key=lambda index: lengths[index])
        batches += [near[first : first + batch_size] for first in range(0, len(near), batch_size)]
    for index in torch.randperm(len(batches), generator=order, device="cpu").tolist():
        yield batches[index]
