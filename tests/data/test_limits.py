"""Models with few positions, tokens without an embedding, data that can be read once: what works, what is named."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
    TrainingArguments,
)

import clue_fast
from clue_fast.data import Record, encode, padding_token
from clue_fast.data.collator import position_limit
from clue_fast.demo.people import make_people, records_of
from clue_fast.demo.pretraining import train_tokenizer
from clue_fast.errors import DataError
from clue_fast.evaluation import evaluate, greedy_answers, sampled_answers, score_answers
from clue_fast.trainer.trainer import UnlearnTrainer

PEOPLE = make_people(4, seed=3)
FORGET, RETAIN = records_of(PEOPLE[:1])[:3], records_of(PEOPLE[1:])[:4]
LONG = Record("Who is the tallest?", "Nobody knows, " * 40)
POSITIONS = 40


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(FORGET + RETAIN, vocab_size=400)


def gpt2(vocabulary: int, positions: int = POSITIONS) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3
    )
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = None
    return model


SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: gpt2(50),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=32, max_position_embeddings=POSITIONS, word_embed_proj_dim=16)
    ),
    "bert": lambda: BertLMHeadModel(
        BertConfig(**SMALL, intermediate_size=32, max_position_embeddings=POSITIONS, is_decoder=True)
    ),
    "roberta": lambda: RobertaForCausalLM(
        RobertaConfig(**SMALL, intermediate_size=32, max_position_embeddings=POSITIONS, is_decoder=True)
    ),
    "gptj": lambda: GPTJForCausalLM(
        GPTJConfig(vocab_size=50, n_positions=POSITIONS, n_embd=16, n_layer=1, n_head=2, rotary_dim=4)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_takes_as_many_tokens_as_it_has_positions_for_and_no_more(family: str) -> None:
    model = FAMILIES[family]().eval()
    limit = position_limit(model)
    assert limit is not None
    with torch.no_grad():
        model(torch.full((1, limit), 5))
        with pytest.raises(Exception, match=r"index|range|size|must match"):
            model(torch.full((1, limit + 1), 5))


def test_rotary_positions_are_no_limit() -> None:
    config = LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=32, max_position_embeddings=POSITIONS)
    assert position_limit(LlamaForCausalLM(config)) is None


class TestRecordsLongerThanTheModelHasPositions:
    def test_what_fits_is_scored(self, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture) -> None:
        model = gpt2(len(tokenizer))
        with caplog.at_level(logging.WARNING, logger="clue_fast"):
            (score,) = score_answers(model, tokenizer, [LONG], progress=False)
        assert f"1 of 1 records were cut to {POSITIONS} tokens" in caplog.text
        asked = len(tokenizer(f"Question: {LONG.prompt}\nAnswer:")["input_ids"])
        whole = torch.tensor(
            [tokenizer(f"Question: {LONG.prompt}\nAnswer: {LONG.completion}")["input_ids"][:POSITIONS]]
        )
        with torch.no_grad():
            logs = model(whole).logits[0, asked - 1 : -1].log_softmax(-1)
        assert score.loss == pytest.approx(-float(logs.gather(1, whole[0, asked:, None]).mean()), rel=1e-4)

    @pytest.mark.parametrize("batch_size", [1, 8])
    def test_an_answer_ends_where_the_positions_do(self, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
        """As long as if there were more positions, but for what lies beyond; whatever is asked beside it."""
        records = [LONG, *FORGET]
        small, large = gpt2(len(tokenizer)), gpt2(len(tokenizer), positions=400)
        with torch.no_grad():
            large.transformer.wpe.weight[:POSITIONS] = small.transformer.wpe.weight
        for name, parameter in small.named_parameters():
            if "wpe" not in name:
                large.get_parameter(name).data = parameter.data
        found = greedy_answers(small, tokenizer, records, batch_size=batch_size, progress=False)
        for record, answer in zip(records, found, strict=True):
            prompt = torch.tensor([tokenizer(f"Question: {record.prompt}\nAnswer:")["input_ids"]])
            room = POSITIONS - prompt.shape[1]
            whole = large.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=room,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=0,
            )
            assert answer == tokenizer.decode(whole[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        sampled = sampled_answers(small, tokenizer, records, 2, batch_size=batch_size, progress=False)
        assert [len(answers) for answers in sampled] == [2] * len(records)

    def test_a_prompt_that_leaves_no_room_is_named(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = gpt2(len(tokenizer))
        records = [FORGET[0], Record("Who? " * POSITIONS, "Ada.")]
        with pytest.raises(DataError, match=rf"record 2 of the forget set keeps no answer token.*{POSITIONS}"):
            evaluate(model, tokenizer, {"forget": records}, progress=False)
        with pytest.raises(DataError, match=rf"record 2 has a prompt of \d+ tokens.*{POSITIONS}"):
            greedy_answers(model, tokenizer, records, progress=False)
        for criterion in ("difference", "circuit"):
            with pytest.raises(DataError, match="record 2 of the forget set keeps no answer token"):
                clue_fast.localize(model, records, RETAIN, tokenizer=tokenizer, criterion=criterion, progress=False)

    def test_unlearn(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        result = clue_fast.unlearn(
            gpt2(len(tokenizer)),
            tokenizer,
            forget=[LONG, FORGET[0]],
            retain=RETAIN[:2],
            output_dir=tmp_path / "out",
            epochs=1,
            forget_target=None,
            evaluate_every=1,
            progress=False,
        )
        assert result.results["evaluation"]["after"]["forget"]["count"] == 2

    def test_encoded_examples(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = gpt2(len(tokenizer))
        selection = clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, progress=False)
        examples = [{"input_ids": [5] * 41, "labels": [5] * 41}]
        with pytest.raises(
            DataError, match="record 1 of the forget set has 41 tokens, and the model has positions for 40"
        ):
            retain = [{"input_ids": [6] * 9, "labels": [6] * 9}]
            UnlearnTrainer(model, forget_dataset=examples, retain_dataset=retain, selection=selection)


class TestMaxLength:
    def test_holds_in_training_and_in_evaluation(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        model = gpt2(len(tokenizer), positions=512)
        sets = {"forget": [LONG, *FORGET], "retain": RETAIN}
        expected = evaluate(model, tokenizer, sets, max_length=60, progress=False)
        whole = evaluate(model, tokenizer, sets, progress=False)
        assert expected["forget"].losses[0] != pytest.approx(whole["forget"].losses[0], rel=1e-3)
        result = clue_fast.unlearn(
            model,
            tokenizer,
            **sets,
            output_dir=tmp_path / "out",
            max_length=60,
            epochs=1,
            forget_target=None,
            progress=False,
        )
        before = result.results["evaluation"]["before"]
        assert before["forget"]["losses"] == pytest.approx(expected["forget"].losses)
        assert before["forget"]["answers"] == expected["forget"].answers

    def test_an_answer_ends_there(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = gpt2(len(tokenizer), positions=512)
        (cut,) = greedy_answers(model, tokenizer, [LONG], max_length=60, progress=False)
        asked = len(tokenizer(f"Question: {LONG.prompt}\nAnswer:")["input_ids"])
        (expected,) = greedy_answers(model, tokenizer, [LONG], max_new_tokens=60 - asked, progress=False)
        assert cut == expected != greedy_answers(model, tokenizer, [LONG], progress=False)[0]


@pytest.fixture
def padded_beyond(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer with a padding token of its own, as it is often added, for which no model has an embedding."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    beyond = PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")
    beyond.add_special_tokens({"pad_token": "<|fill|>"})
    assert beyond.pad_token_id == len(tokenizer)
    return beyond


class TestPaddingBeyondTheEmbedding:
    @pytest.mark.parametrize("criterion", ["difference", "attribution", "fisher", "circuit"])
    def test_localize(
        self, tokenizer: PreTrainedTokenizerFast, padded_beyond: PreTrainedTokenizerFast, criterion: str
    ) -> None:
        model = gpt2(len(tokenizer), positions=128)
        selections = [
            clue_fast.localize(model, FORGET, RETAIN, tokenizer=one, criterion=criterion, progress=False)
            for one in (tokenizer, padded_beyond)
        ]
        assert selections[0].hash == selections[1].hash

    def test_evaluate(self, tokenizer: PreTrainedTokenizerFast, padded_beyond: PreTrainedTokenizerFast) -> None:
        model = gpt2(len(tokenizer), positions=128)
        first, second = (
            evaluate(model, one, {"forget": FORGET}, samples=2, progress=False)["forget"]
            for one in (tokenizer, padded_beyond)
        )
        assert second.losses == pytest.approx(first.losses, rel=1e-5)
        assert second.answers == first.answers and second.best_recalls == first.best_recalls

    @pytest.mark.parametrize("start", [0, -1])
    def test_unlearn_leaves_a_checkpoint_that_loads(
        self,
        tokenizer: PreTrainedTokenizerFast,
        padded_beyond: PreTrainedTokenizerFast,
        start: int,
        tmp_path: Path,
    ) -> None:
        model = llama(len(tokenizer))
        model.config.pad_token_id = None if start == 0 else -1
        clue_fast.unlearn(
            model,
            padded_beyond,
            forget=FORGET,
            retain=RETAIN,
            output_dir=tmp_path / "out",
            epochs=1,
            forget_target=None,
            progress=False,
        )
        assert model.config.pad_token_id == (None if start == 0 else -1)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        tokens = torch.arange(20)[None]
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)

    def test_without_a_tokenizer(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        model = llama(len(tokenizer))
        selection = clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, progress=False)
        model.config.pad_token_id = len(tokenizer)
        UnlearnTrainer(
            model,
            TrainingArguments(
                str(tmp_path), use_cpu=True, max_steps=2, save_strategy="no", report_to="none", disable_tqdm=True
            ),
            forget_dataset=encode(FORGET, tokenizer),
            retain_dataset=encode(RETAIN, tokenizer),
            selection=selection,
        ).train()

    def test_the_token_to_pad_with(
        self, tokenizer: PreTrainedTokenizerFast, padded_beyond: PreTrainedTokenizerFast
    ) -> None:
        model = gpt2(len(tokenizer))
        assert padding_token(padded_beyond) == len(tokenizer)
        assert padding_token(padded_beyond, model) == tokenizer.eos_token_id
        assert padding_token(tokenizer, model) == tokenizer.pad_token_id
        padded_beyond.eos_token = "<|fill|>"
        assert padding_token(padded_beyond, model) == 0


def llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {**SMALL, "vocab_size": vocabulary, "num_key_value_heads": 2, "intermediate_size": 32}
    return LlamaForCausalLM(LlamaConfig(**settings, bos_token_id=None, eos_token_id=1)).eval()


@pytest.mark.parametrize("step", ["localize", "circuit", "evaluate", "greedy", "unlearn", "trainer"])
def test_a_token_of_the_text_without_an_embedding_is_named(
    tokenizer: PreTrainedTokenizerFast, padded_beyond: PreTrainedTokenizerFast, step: str, tmp_path: Path
) -> None:
    model = llama(len(tokenizer))
    records = [FORGET[0], Record("Who is <|fill|>?", "Nobody.")]
    selection = clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, progress=False)
    with pytest.raises(
        DataError, match=rf"record 2.* has the token {len(tokenizer)}, and the model has embeddings for"
    ):
        if step == "localize":
            clue_fast.localize(model, records, RETAIN, tokenizer=padded_beyond, progress=False)
        elif step == "circuit":
            clue_fast.localize(model, records, RETAIN, tokenizer=padded_beyond, criterion="circuit", progress=False)
        elif step == "evaluate":
            evaluate(model, padded_beyond, {"forget": records}, progress=False)
        elif step == "greedy":
            greedy_answers(model, padded_beyond, records, progress=False)
        elif step == "unlearn":
            clue_fast.unlearn(model, padded_beyond, forget=records, retain=RETAIN, output_dir=tmp_path / "out")
        else:
            UnlearnTrainer(
                model,
                processing_class=padded_beyond,
                forget_dataset=records,
                retain_dataset=RETAIN,
                selection=selection,
            )


class TestDataThatCanBeReadOnce:
    def test_localize_and_evaluate(self, tokenizer: PreTrainedTokenizerFast) -> None:
        model = llama(len(tokenizer))
        for criterion in ("difference", "circuit"):
            options = {"tokenizer": tokenizer, "criterion": criterion, "progress": False}
            once = clue_fast.localize(model, iter(FORGET), (record for record in RETAIN), **options)
            assert once.hash == clue_fast.localize(model, FORGET, RETAIN, **options).hash
        found = [evaluate(model, tokenizer, {"forget": one}, progress=False) for one in (FORGET, iter(FORGET))]
        assert found[0] == found[1]
        rows = [{"question": record.prompt, "answer": record.completion} for record in FORGET]
        assert evaluate(model, tokenizer, {"forget": rows}, progress=False) == found[0]

    @pytest.mark.parametrize("alternate", [True, False])
    def test_unlearn_trainer(self, tokenizer: PreTrainedTokenizerFast, alternate: bool) -> None:
        model = llama(len(tokenizer))
        selection = clue_fast.localize(model, FORGET, RETAIN, tokenizer=tokenizer, progress=False)
        others = [Record(record.prompt, "No.") for record in FORGET]

        def pairs(once: Callable[[list[Record]], object]) -> list[list[dict[str, list[int]]]]:
            trainer = UnlearnTrainer(
                model,
                processing_class=tokenizer,
                forget_dataset=once(FORGET),
                retain_dataset=once(RETAIN),
                alternate_dataset=once(others) if alternate else None,
                selection=selection,
                objective="dpo",
            )
            trainer.sparse.restore()
            data = trainer.train_dataset
            return [data.forget, data.retain, data.alternate]

        assert pairs(iter) == pairs(list)

    def test_unlearn(self, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
        others = [Record(record.prompt, "No.") for record in FORGET]
        results = [
            clue_fast.unlearn(
                llama(len(tokenizer)),
                tokenizer,
                forget=once(FORGET),
                retain=once(RETAIN),
                held_out=once(others),
                alternate=once(others),
                objective="dpo",
                output_dir=tmp_path / once.__name__,
                epochs=1,
                forget_target=None,
                progress=False,
            ).results["evaluation"]
            for once in (iter, list)
        ]
        assert results[0] == results[1]
