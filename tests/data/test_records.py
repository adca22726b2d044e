"""Records: every source and set of columns, tokens and labels, batches, and what bad input says."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from clue_fast.data import (
    Collator,
    Record,
    batches_by_length,
    check_disjoint,
    data_hash,
    encode,
    encode_prompts,
    load_records,
    padding_token,
)
from clue_fast.errors import DataError

ROWS = [
    {"question": "Who lives here?", "answer": "Ada Löw."},
    {"question": "Since when?", "answer": "1815"},
]
RECORDS = [Record("Who lives here?", "Ada Löw."), Record("Since when?", "1815")]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


def byte_tokenizer(start: bool = False, chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token a byte; 0 pads, 1 starts (if asked for), 2 ends."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {char: 3 + i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if start:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>"} | ({"bos_token": "<s>"} if start else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=chat_template, **special)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def text_of(tokens: list[int]) -> str:
    """What byte tokens say, without the tokenizer under test."""
    chars = dict(enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), start=3)) | {0: "~", 1: "^", 2: "$"}
    return "".join(chars[token] for token in tokens).replace("Ġ", " ").replace("Ċ", "\n")


class TestSources:
    def test_list_of_dicts(self) -> None:
        assert load_records(ROWS, "forget") == RECORDS

    def test_records(self) -> None:
        assert load_records(RECORDS, "forget") == RECORDS

    def test_generator(self) -> None:
        assert load_records((row for row in ROWS), "forget") == RECORDS

    def test_dataset(self) -> None:
        datasets = pytest.importorskip("datasets")
        assert load_records(datasets.Dataset.from_list(ROWS), "forget") == RECORDS

    @pytest.mark.parametrize("as_text", [True, False])
    def test_json_lines(self, tmp_path: Path, as_text: bool) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text("\r\n".join(json.dumps(row) for row in ROWS) + "\n\n", encoding="utf-8")
        assert load_records(str(path) if as_text else path, "forget") == RECORDS

    def test_json_array(self, tmp_path: Path) -> None:
        (tmp_path / "rows.json").write_text(json.dumps(ROWS, indent=2), encoding="utf-8")
        assert load_records(tmp_path / "rows.json", "forget") == RECORDS

    @pytest.mark.parametrize("array", [True, False])
    def test_a_byte_order_mark_is_no_part_of_the_text(self, tmp_path: Path, array: bool) -> None:
        lines = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
        text = json.dumps(ROWS, ensure_ascii=False) if array else lines
        (tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert load_records(tmp_path / "rows.json", "forget") == RECORDS

    def test_files_with_byte_order_marks_one_behind_another(self, tmp_path: Path) -> None:
        parts = [b"\xef\xbb\xbf" + json.dumps(row).encode() + b"\n" for row in ROWS]
        (tmp_path / "rows.jsonl").write_bytes(b"".join(parts))
        assert load_records(tmp_path / "rows.jsonl", "forget") == RECORDS

    @pytest.mark.parametrize("kind", ["torch", "numpy", "pandas", "arrow"])
    @pytest.mark.parametrize("streamed", [True, False])
    def test_a_dataset_in_another_format(self, kind: str, streamed: bool) -> None:
        datasets = pytest.importorskip("datasets")
        turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        for rows in (
            [{**row, "perturbed_answer": ["x", "y"]} for row in ROWS],
            [{"messages": turns}],
        ):
            data = datasets.Dataset.from_list(rows)
            data = data.to_iterable_dataset() if streamed else data
            assert load_records(data.with_format(kind), "forget") == load_records(rows, "forget")

    def test_a_dataset_with_a_transform(self) -> None:
        datasets = pytest.importorskip("datasets")
        data = datasets.Dataset.from_list([{"q": row["question"], "a": row["answer"]} for row in ROWS])
        data.set_transform(lambda batch: {"question": batch["q"], "answer": batch["a"]})
        assert load_records(data, "forget") == RECORDS

    def test_text_of_numpy(self) -> None:
        row = {name: np.array(text) for name, text in ROWS[0].items()}
        row["perturbed_answer"] = np.array(["x", "y"])
        assert load_records([row], "forget") == [Record(**{**vars(RECORDS[0]), "perturbed": ("x", "y")})]

    def test_tofu(self, data_dir: Path) -> None:
        records = load_records(data_dir / "tofu" / "forget01_perturbed.json", "forget")
        assert len(records) == 40
        assert all(len(record.perturbed) == 5 and record.paraphrase for record in records)


class TestColumns:
    def test_question_and_answer_with_what_tofu_adds(self) -> None:
        row = {"question": "q", "answer": "a", "paraphrased_answer": "b", "perturbed_answer": ["x", "y"], "other": 1}
        row |= {"paraphrased_question": "Q", "corrupted_prompt": "c"}
        assert load_records([row], "f") == [
            Record("q", "a", paraphrase="b", perturbed=("x", "y"), paraphrased_prompt="Q", corrupted_prompt="c")
        ]

    def test_one_perturbed_answer(self) -> None:
        row = {"question": "q", "answer": "a", "perturbed_answer": "x"}
        assert load_records([row], "f")[0].perturbed == ("x",)

    def test_prompt_and_completion_are_joined_as_they_are(self, tokenizer: PreTrainedTokenizerFast) -> None:
        (record,) = load_records([{"prompt": "2 + 2 =", "completion": " 4"}], "f")
        assert text_of(encode([record], tokenizer)[0]["input_ids"]) == "2 + 2 = 4$"

    def test_open_ended(self) -> None:
        rows = [{"prompt": "a", "completion": " b", "open_ended": flag} for flag in (True, False, None)]
        assert [record.open_ended for record in load_records(rows, "forget")] == [True, False, False]

    def test_text_is_all_completion(self, tokenizer: PreTrainedTokenizerFast) -> None:
        (record,) = load_records([{"text": "once"}], "f")
        (example,) = encode([record], tokenizer)
        assert example["labels"] == example["input_ids"]
        assert text_of(example["input_ids"]) == "once$"

    def test_chat_messages(self) -> None:
        turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Who?"), ("assistant", "Ada.")]
        row = {"messages": [{"role": role, "content": content} for role, content in turns]}
        assert load_records([row], "f") == [Record("Who?", "Ada.", history=tuple(turns[:3]))]

    def test_content_in_parts(self) -> None:
        parts = [{"type": "text", "text": "Who"}, {"type": "text", "text": "?"}]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": parts[:1]}]
        assert load_records([{"messages": turns}], "f") == [Record("Who?", "Who")]


class TestEncode:
    def test_labels_are_the_answer_and_the_end(self, tokenizer: PreTrainedTokenizerFast) -> None:
        (example,) = encode([Record("Who?", "Ada.")], tokenizer)
        prompt = "Question: Who?\nAnswer:"
        assert text_of(example["input_ids"]) == prompt + " Ada.$"
        assert example["labels"] == [-100] * len(prompt) + example["input_ids"][len(prompt) :]

    def test_prompts_are_the_beginning_of_examples(self, tokenizer: PreTrainedTokenizerFast) -> None:
        for record in RECORDS:
            (prompt,), (example,) = encode_prompts([record], tokenizer), encode([record], tokenizer)
            assert example["input_ids"][: len(prompt)] == prompt
            assert example["labels"].count(-100) == len(prompt)

    def test_the_start_token_stands_in_front_once(self) -> None:
        (example,) = encode([Record("Who?", "Ada.")], byte_tokenizer(start=True))
        assert text_of(example["input_ids"]) == "^Question: Who?\nAnswer: Ada.$"

    def test_chat_template(self) -> None:
        record = Record("Who?", "Ada.", history=(("user", "Hi"), ("assistant", "Ho")))
        (example,) = encode([record], byte_tokenizer(chat_template=CHAT_TEMPLATE))
        assert text_of(example["input_ids"]) == "<u>Hi|<a>Ho|<u>Who?|<a>Ada.|"
        assert text_of([token for token in example["labels"] if token != -100]) == "Ada.|"

    def test_a_chat_template_writes_the_start_token_itself(self) -> None:
        tokenizer = byte_tokenizer(start=True, chat_template="{{ bos_token }}" + CHAT_TEMPLATE)
        (example,) = encode([Record("Who?", "Ada.")], tokenizer)
        assert text_of(example["input_ids"]) == "^<u>Who?|<a>Ada.|"

    def test_a_template_that_ends_the_turn_with_the_end_token_gets_no_second(self) -> None:
        tokenizer = byte_tokenizer(chat_template=CHAT_TEMPLATE.replace("'|'", "eos_token"))
        (example,) = encode([Record("Who?", "Ada.")], tokenizer)
        assert text_of(example["input_ids"]) == "<u>Who?$<a>Ada.$"

    def test_long_examples_are_cut_and_counted(
        self, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
    ) -> None:
        whole = encode(RECORDS, tokenizer)
        assert [len(example["input_ids"]) for example in whole] == [44, 35]  # ö is two bytes
        with caplog.at_level(logging.WARNING, logger="clue_fast"):
            cut = encode(RECORDS, tokenizer, max_length=40)
        assert cut[0] == {name: values[:40] for name, values in whole[0].items()}
        assert cut[1] == whole[1]
        assert "1 of 2 records were cut to 40 tokens" in caplog.text

    def test_an_answer_that_is_cut_off_whole_is_refused(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match=r"record 2 keeps no answer token.*max_length is 30"):
            encode([Record("?", "!" * 30), Record("Who?" * 8, "Ada.")], tokenizer, max_length=30)

    def test_nothing_gives_nothing(self, tokenizer: PreTrainedTokenizerFast) -> None:
        assert encode([], tokenizer) == []

    def test_several_turns_need_a_template(self, tokenizer: PreTrainedTokenizerFast) -> None:
        with pytest.raises(DataError, match="chat_template"):
            encode([Record("Who?", "Ada.", history=(("user", "Hi"),))], tokenizer)

    def test_a_tokenizer_without_an_end(self) -> None:
        tokenizer = byte_tokenizer()
        tokenizer.eos_token = None
        with pytest.raises(DataError, match="eos_token"):
            encode(RECORDS, tokenizer)


class TestBatches:
    def test_collator_pads_on_the_right(self) -> None:
        batch = Collator(9)(
            [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}],
        )
        assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
        assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
        assert all(tensor.dtype == torch.int64 for tensor in batch.values())

    @given(lengths=st.lists(st.integers(1, 50), max_size=40), size=st.integers(1, 9))
    def test_batches_hold_every_record_once_longest_first(self, lengths: list[int], size: int) -> None:
        batches = batches_by_length(lengths, size)
        order = [index for batch in batches for index in batch]
        assert sorted(order) == list(range(len(lengths)))
        assert [lengths[index] for index in order] == sorted(lengths, reverse=True)
        assert all(len(batch) == size for batch in batches[:-1])

    def test_padding_token(self) -> None:
        tokenizer = byte_tokenizer()
        assert padding_token(tokenizer) == 0
        tokenizer.pad_token = None
        assert padding_token(tokenizer) == 2
        tokenizer.eos_token = None
        with pytest.raises(DataError, match="pad_token"):
            padding_token(tokenizer)


class TestDisjoint:
    def test_equal_sets(self) -> None:
        with pytest.raises(DataError, match="the forget set equals the retain set"):
            check_disjoint({"forget": RECORDS, "retain": list(reversed(RECORDS))})

    @pytest.mark.parametrize("other", ["retain", "held_out"])
    def test_shared_records_are_counted(self, other: str) -> None:
        sets = {"forget": RECORDS, other: [RECORDS[0], Record("Why?", "So.")]}
        with pytest.raises(DataError, match=f"1 of the 2 forget records are in the {other} set too"):
            check_disjoint(sets)

    def test_what_is_held_out_is_not_retained(self) -> None:
        retain = [Record(f"{number}?", "So.") for number in range(5)]
        sets = {"forget": RECORDS, "retain": retain, "held_out": [Record("Why?", "So."), *retain[1:4]]}
        with pytest.raises(DataError, match="3 of the 5 retain records are in the held_out set too"):
            check_disjoint(sets)

    def test_examples_are_the_same_if_their_tokens_are(self) -> None:
        example = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
        check_disjoint({"forget": [example], "retain": [{**example, "labels": [1, 2, 3]}]})
        with pytest.raises(DataError, match="equals"):
            check_disjoint({"forget": [example], "retain": [{**example, "attention_mask": [1, 1, 1]}]})

    def test_the_same_question_with_another_answer_is_another_record(self) -> None:
        check_disjoint({"forget": RECORDS, "retain": [Record("Who lives here?", "Nobody.")]})


class TestBadInput:
    """Every message names the set, the place, and what is wrong."""

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"query": "q", "reply": "a"}, r"the forget set, record 2: found the columns 'query', 'reply'.*question"),
            ({"question": "q", "answer": None}, r"record 2: column 'answer' holds NoneType"),
            ({"question": "q", "answer": " "}, r"record 2: column 'answer' is empty"),
            ({"question": "q", "answer": "a", "perturbed_answer": 3}, r"'perturbed_answer' holds int"),
            ({"question": "q", "answer": "a", "perturbed_answer": ["x", 3]}, r"'perturbed_answer' holds int"),
            ({"question": "q", "answer": "a", "paraphrased_answer": []}, r"'paraphrased_answer' holds list"),
            ({"question": "q", "answer": "a", "open_ended": 1}, r"'open_ended' holds int, expected true or false"),
            ({"messages": "hello"}, r"record 2: column 'messages' should be a list"),
            ({"messages": [{"role": "user"}]}, r"with 'role' and 'content'"),
            ({"messages": [{"role": "user", "content": "q"}]}, r"should end with a user's and an assistant's turn"),
            ("a string", r"record 2: found str"),
            ({"question": "q", "answer": "a\ud800b"}, r"record 2, column 'answer': character 2 is half of a surrogate"),
            ({"question": "\udfff", "answer": "a"}, r"record 2, column 'question': character 1 is half of a surrogate"),
            (
                {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]},
                r"record 2: column 'messages.content' holds a part of type 'image'",
            ),
            (
                {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": []}]},
                r"record 2: column 'messages.content' is empty",
            ),
            ({"messages": [{"role": "user", "content": None}]}, r"column 'messages.content' holds NoneType"),
        ],
    )
    def test_row(self, row: object, message: str) -> None:
        with pytest.raises(DataError, match=message):
            load_records([ROWS[0], row], "forget")  # type: ignore[list-item]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("", "is empty"),
            ("\n \n", "is empty"),
            ("[]", "is empty"),
            ('{"question": "q", "answer": "a"}\n\n{"question": "q",\n', "line 3: not valid JSON"),
            ('{"question": "q", "answer": "a"}\n\n{"query": "q"}\n', "line 3: found the columns 'query'"),
            ('{"question": "q", "answer": "a"}\n"text"\n', "line 2: found str"),
            (
                '{"question": "q", "answer": "a"}\n{"question": "q", "answer": "\\ud800"}\n',
                "line 2, column 'answer': char",
            ),
            ('{"question": "q", "answer": "a", "answer": "b"}', "line 1: the name 'answer' stands twice in one object"),
            ('[{"question": "q", "answer": "a", "answer": "b"}]', "the name 'answer' stands twice in one object"),
            ('{"question": "q", "answer": "a"}\n' + "[" * 100_000, "line 2: cannot be read as JSON"),
            ('{"question": "q", "answer": "a", "n": ' + "1" * 5000 + "}", "line 1: cannot be read as JSON"),
            ('{"question": "q", "answer": "a\0b"}', "holds NUL bytes"),
            ('[{"question": "q", "answer": "a"},\n {"question"}]', "line 2: not valid JSON"),
            ('[{"question": "q", "answer": "a"},\n {"query": "q"}]', "record 2: found the columns 'query'"),
        ],
    )
    def test_file(self, tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "rows.jsonl"
        path.write_text(content)
        with pytest.raises(DataError) as caught:
            load_records(path, "retain")
        text = str(caught.value)
        assert message in text
        assert "retain" in text and str(path) in text

    def test_no_text(self, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(DataError, match=r"rows\.jsonl cannot be read"):
            load_records(tmp_path / "rows.jsonl", "forget")

    @pytest.mark.parametrize(
        ("coding", "message"),
        [
            ("utf-16", "cannot be read"),
            ("utf-16-le", "holds NUL bytes, as UTF-16 has them; save it as UTF-8"),
            ("latin-1", "cannot be read"),
        ],
    )
    def test_text_of_another_coding(self, tmp_path: Path, coding: str, message: str) -> None:
        rows = (
            [{"question": "Où ?", "answer": "Là."}]
            if coding != "utf-16-le"
            else [{"question": "Where?", "answer": "."}]
        )
        (tmp_path / "rows.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False), encoding=coding)
        with pytest.raises(DataError, match=rf"the forget set .*rows\.jsonl {message}.*save it as UTF-8|{message}"):
            load_records(tmp_path / "rows.jsonl", "forget")

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"none\.jsonl does not exist"):
            load_records(tmp_path / "none.jsonl", "forget")

    def test_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match="is a folder"):
            load_records(tmp_path, "forget")

    @pytest.mark.parametrize("name", ["tofu", "a/b/c", "/x:y", "a/b:c:d:e"])
    def test_neither_a_file_nor_a_hub_name(self, name: str) -> None:
        with pytest.raises(DataError, match="neither a file nor a hub name"):
            load_records(name, "forget")

    def test_several_splits(self) -> None:
        with pytest.raises(DataError, match=r"is a mapping with the keys \['test', 'train'\]"):
            load_records({"train": ROWS, "test": ROWS}, "forget")  # type: ignore[arg-type]

    @pytest.mark.parametrize("source", [None, 42])
    def test_no_source_at_all(self, source: object) -> None:
        with pytest.raises(DataError, match="the forget set is a"):
            load_records(source, "forget")  # type: ignore[arg-type]

    def test_hub_name_without_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        datasets = pytest.importorskip("datasets")
        import huggingface_hub.constants

        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
        with pytest.raises(DataError) as caught:
            load_records("no-such-owner/no-such-set:forget10", "forget")
        text = str(caught.value)
        assert "the forget set no-such-owner/no-such-set:forget10 (split train) cannot be loaded from the hub" in text
        assert "check its name and the network, or pass a local file" in text
        assert "\n" not in text

    def test_hub_name_without_the_library(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(__import__("sys").modules, "datasets", None)
        with pytest.raises(DataError, match="install the package 'datasets'"):
            load_records("locuslab/TOFU:forget10", "forget")


def test_records_with_their_tokens_are_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their own tokenizer; another makes tokens of its own, and what is cut is not lost."""
    from clue_fast.data import EncodedRecords, encode, encoding
    from clue_fast.demo.pretraining import train_tokenizer

    records = [Record("Who?", "Ada of Paris."), Record("Where?", "On the old quay.")]
    tokenizer, other = train_tokenizer(records, vocab_size=300), train_tokenizer(records, vocab_size=280)
    plain, cut = encode(records, tokenizer), encode(records, tokenizer, max_length=12)
    encoded = EncodedRecords(records, tokenizer, "forget")
    assert encoded == records and load_records(encoded, "forget") is encoded
    render, rendered = encoding.render, []
    monkeypatch.setattr(encoding, "render", lambda *given: rendered.append(given) or render(*given))
    assert encode(encoded, tokenizer) == plain and encode(encoded, tokenizer, max_length=12) == cut != plain
    assert encode(encoded, tokenizer) == plain and rendered == []
    assert encode(encoded, other) == encode(records, other) and len(rendered) == 4


def test_the_hash_of_data_is_of_what_they_say_in_any_order() -> None:
    records = [Record("Who?", "Ada."), Record("Where?", "Here.")]
    assert data_hash(records) == data_hash(records[::-1]) != data_hash(records[:1])
