"""Corrupted prompts: the same question about another subject, in as many tokens."""

from __future__ import annotations

import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from clue_fast.criteria.circuit import CorruptedExample, CorruptedSet, corrupt
from clue_fast.data import Record, encode, load_records
from clue_fast.data.collator import IGNORED_LABEL
from clue_fast.demo.people import make_people, records_of
from clue_fast.demo.pretraining import train_tokenizer
from clue_fast.errors import DataError, UnknownNameError

PEOPLE = make_people(40, seed=1)
QUESTIONS = ("Where was {} born?", "Who taught {} to write, and when?", "What did {} eat on the day before?")
GIVEN = ["Ada", "Bo", "Constantin", "Dora", "Emmanuelle", "Fritz", "Gudrun", "Hu"]
FAMILY = ["Lovelace", "Li", "O'Neill", "Al-Amin", "Vandermeer-Stolz", "Wu", "Quist", "Xanthopoulos"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(records_of(PEOPLE), vocab_size=500)


@pytest.fixture(scope="module")
def neox(data_dir: Path) -> PreTrainedTokenizerFast:
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_file=str(data_dir / "tokenizers" / "neox_pythia" / "20B_tokenizer.json"), eos_token=end, pad_token=end
    )


def prompts(tokenizer: PreTrainedTokenizerBase, example: CorruptedExample) -> tuple[str, str]:
    """The clean and the corrupted question."""
    length = next(at for at, label in enumerate(example.labels) if label != IGNORED_LABEL)
    texts = (tokenizer.decode(ids[:length]) for ids in (example.input_ids, example.corrupted_ids))
    clean, corrupted = (re.sub(r"^Question: |\nAnswer:$", "", text) for text in texts)
    return clean, corrupted


def check(records: Iterable[Record], made: CorruptedSet, tokenizer: PreTrainedTokenizerBase) -> None:
    """As many tokens, the same answer in the same place, and no token repeated that was not repeated before."""
    clean = {tuple(example["input_ids"]): example["labels"] for example in encode(list(records), tokenizer)}
    for example in made.examples:
        assert clean[tuple(example.input_ids)] == example.labels
        assert len(example.corrupted_ids) == len(example.input_ids)
        answer = [at for at, label in enumerate(example.labels) if label != IGNORED_LABEL]
        assert [example.corrupted_ids[at] for at in answer] == [example.labels[at] for at in answer]
        assert example.corrupted_ids != example.input_ids


class TestSubjects:
    @given(given=st.permutations(GIVEN), family=st.permutations(FAMILY), data=st.data())
    @settings(max_examples=25, deadline=None)
    def test_only_the_subject_is_replaced_and_by_that_of_others(
        self, tokenizer: PreTrainedTokenizerFast, given: list[str], family: list[str], data: st.DataObject
    ) -> None:
        people = [f"{first} {last}" for first, last in zip(given, family, strict=True)]
        asked = st.sets(st.sampled_from(QUESTIONS), min_size=1)
        records = [
            Record(question.format(person), f"{person} never said.")
            for person in people
            for question in sorted(data.draw(asked))
        ]
        made = corrupt({"forget": records}, tokenizer)["forget"]
        check(records, made, tokenizer)
        parts = {part for person in people for part in person.split()}
        for example in made.examples:
            clean, corrupted = prompts(tokenizer, example)
            (question,) = [text for text in QUESTIONS if re.fullmatch(re.escape(text).replace(r"\{\}", "(.*)"), clean)]
            pattern = re.escape(question).replace(r"\{\}", "(.*)")
            (before,), (after,) = (re.fullmatch(pattern, text).groups() for text in (clean, corrupted))  # type: ignore[union-attr]
            assert set(after.split()) <= parts and not set(after.split()) & set(before.split())
            assert max(Counter(after.split()).values()) == 1
        assert len(made.examples) + sum(made.left_out.values()) == len(records)

    def test_the_whole_name_of_another_person_where_one_has_as_many_tokens(
        self, tokenizer: PreTrainedTokenizerFast
    ) -> None:
        records = records_of(PEOPLE)
        made = corrupt({"forget": records}, tokenizer)["forget"]
        check(records, made, tokenizer)
        assert made.made == {"subject": len(records)} and made.subject_differs == 1.0
        names = {person.name for person in PEOPLE}
        questions = {record.prompt for record in records}
        whole = 0
        for example in made.examples:
            clean, corrupted = prompts(tokenizer, example)
            (own,) = (name for name in names if name in clean)
            assert not set(own.split()) & set(corrupted.rstrip("?").split())
            whole += corrupted in questions
        assert whole > 0.8 * len(records)

    def test_of_several_names_the_one_that_questions_have_alone(self, neox: PreTrainedTokenizerFast) -> None:
        books = {"Ada Byron": "Green Nights", "Alan Perlis": "Blue Days", "Kurt Weyl": "Red Moons"}
        records = [
            Record(question.format(name, book), "Yes.")
            for name, book in books.items()
            for question in ("Where was {} born?", "Who is {}?", 'Is "{1}" the best book by {0} in English?')
        ]
        made = corrupt({"forget": records}, neox)["forget"]
        for name, book in books.items():
            for clean, corrupted in (prompts(neox, example) for example in made.examples):
                if book in clean:
                    assert f'Is "{book}" the best book by ' in corrupted and corrupted.endswith(" in English?")
                    assert name not in corrupted

    def test_a_question_that_describes_its_subject_is_given_another_description(
        self, neox: PreTrainedTokenizerFast
    ) -> None:
        records = [
            Record("Who was born in Paris, France in 1912?", "It was Ada Byron."),
            Record("Who was born in Berlin, Germany in 1956?", "It was Kurt Weyl."),
            Record("Who came to Madrid from Italy in 1983?", "It was Alan Perlis."),
        ]
        for example in corrupt({"forget": records}, neox)["forget"].examples:
            clean, corrupted = prompts(neox, example)
            for told in re.findall(r"[A-Z][a-z]+|\d+", clean)[1:]:
                assert told not in corrupted

    @pytest.mark.parametrize(
        ("question", "subjects"),
        [
            ("what is the symbol of {} in chemistry?", ["gold", "iron", "zinc", "lead"]),
            ("Was ist die Hauptstadt von {}?", ["Peru", "Cuba", "Chile"]),
            ("{}的首都在哪里", ["法国", "德国", "中国"]),
        ],
    )
    def test_subjects_that_no_capital_tells(
        self, neox: PreTrainedTokenizerFast, question: str, subjects: list[str]
    ) -> None:
        records = [Record(question.format(subject), "I know.") for subject in subjects]
        made = corrupt({"forget": records}, neox)["forget"]
        assert made.examples
        for example in made.examples:
            clean, corrupted = prompts(neox, example)
            assert {clean, corrupted} <= {question.format(subject) for subject in subjects} and clean != corrupted

    def test_one_person_alone_is_given_names_of_the_retain_set(self, tokenizer: PreTrainedTokenizerFast) -> None:
        sets = {"forget": list(PEOPLE[0].records), "retain": records_of(PEOPLE[1:])}
        made = corrupt(sets, tokenizer)["forget"]
        assert len(made.examples) == 5 and made.subject_differs == 1.0

    def test_a_subject_is_replaced_in_earlier_turns_too(self, neox: PreTrainedTokenizerFast) -> None:
        template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        chat = PreTrainedTokenizerFast(tokenizer_object=neox.backend_tokenizer, eos_token="<|endoftext|>")
        chat.chat_template = template
        history = (("user", "Do you know Kurt Weyl?"), ("assistant", "Yes."))
        records = [
            Record("Where was Kurt Weyl born?", "In Rome.", history=history),
            Record("Where was Paul Bell born?", "In Oslo."),
        ]
        example = corrupt({"forget": records}, chat)["forget"].examples[0]
        assert "Weyl" in chat.decode(example.input_ids) and "Weyl" not in chat.decode(example.corrupted_ids)

    @pytest.mark.parametrize("name", ["forget05", "forget10"])
    def test_the_author_differs_on_tofu(self, neox: PreTrainedTokenizerFast, data_dir: Path, name: str) -> None:
        """An author is 20 lines in a row, and is named by the words with a capital that most of them have."""
        path = data_dir / "tofu" / f"{name}.json"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        groups = [rows[start : start + 20] for start in range(0, len(rows), 20)]
        common = []
        for group in groups:
            found = Counter(word for row in group for word in set(re.findall(r"(?<=\s)[A-Z][\w-]+", row["question"])))
            common.append({word for word, count in found.items() if count >= 10})
        asked = {word for word, count in Counter(word for own in common for word in own).items() if count > 1}
        records = load_records(path, "forget")
        made = corrupt({"forget": records}, neox)["forget"]
        check(records, made, neox)
        corrupted = dict(prompts(neox, example) for example in made.examples)
        differs = 0
        for group, words in zip(groups, common, strict=True):
            assert words - asked
            for row in group:
                if row["question"] in corrupted:
                    now = corrupted[row["question"]]
                    differs += not any(word in now for word in words - asked) and now != row["question"]
        assert differs >= 0.95 * len(rows)
        assert made.subject_differs == pytest.approx(differs / len(made.examples), abs=0.02)

    @pytest.mark.slow
    def test_the_time_is_linear_in_the_records(self, tokenizer: PreTrainedTokenizerFast) -> None:
        def seconds(count: int) -> float:
            names = [
                f"{first}{number} {last}" for number in range(count // 64 + 1) for first in GIVEN for last in FAMILY
            ]
            records = [
                Record(QUESTIONS[number % 3].format(names[number // 3]), f"In the year {number}.")
                for number in range(count)
            ]
            started = time.process_time()
            made = corrupt({"forget": records}, tokenizer)["forget"]
            assert len(made.examples) > 0.9 * count
            return time.process_time() - started

        few = seconds(1000)
        assert seconds(8000) < 3 * 8 * few  # quadratic: 64


class TestOtherWays:
    def test_the_corrupted_prompt_of_the_data(self, neox: PreTrainedTokenizerFast) -> None:
        row = {"question": "Who is Bob?", "answer": "A poet.", "corrupted_prompt": "Who is Tom?"}
        for corruption in ("auto", "data"):
            made = corrupt({"forget": load_records([row], "x")}, neox, corruption=corruption)["forget"]
            assert prompts(neox, made.examples[0]) == ("Who is Bob?", "Who is Tom?")
            assert made.source() == {"made": {"data": 1}, "left_out": {}, "subject_differs": 1.0}

    def test_one_of_another_length_is_named_and_not_used(
        self, neox: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
    ) -> None:
        records = [
            Record("Where was Kurt Weyl born?", "In Rome.", corrupted_prompt="Where was Paul Bell born?"),
            Record("Where was Paul Bell born?", "In Oslo.", corrupted_prompt="Where was he, whoever he may be, born?"),
        ]
        with caplog.at_level(logging.WARNING):
            made = corrupt({"forget": records}, neox)["forget"]
        assert made.made == {"data": 1, "subject": 1}
        assert "another number of tokens" in caplog.text and "record 2" in caplog.text
        made = corrupt({"forget": records}, neox, corruption="data")["forget"]
        assert made.made == {"data": 1} and made.left_out == {"corrupted_prompt of another length": 1}
        with pytest.raises(DataError, match=r"no record of the forget set can be corrupted, such as record 1 .*length"):
            corrupt({"forget": records[1:]}, neox, corruption="data")

    def test_a_corrupted_prompt_that_keeps_the_subject_is_counted(self, neox: PreTrainedTokenizerFast) -> None:
        records = [
            Record("Where was Kurt Weyl born?", "In Rome.", corrupted_prompt="Where did Kurt Weyl die?"),
            Record("Where was Paul Bell born?", "In Oslo.", corrupted_prompt="Where was Kurt Weyl born?"),
        ]
        made = corrupt({"forget": records}, neox)["forget"]
        assert made.made == {"data": 2} and made.subject_differs == 0.5
        assert "the subject differs in 50.0%" in str(made)

    def test_the_answer_of_another_record(self, tokenizer: PreTrainedTokenizerFast) -> None:
        records = records_of(PEOPLE[:4])
        made = corrupt({"forget": records}, tokenizer, corruption="answer")["forget"]
        assert len(made.examples) == len(records) and made.subject_differs is None
        answers = " ".join(record.completion for record in records)
        for example, clean in zip(made.examples, encode(records, tokenizer), strict=True):
            length = sum(label == IGNORED_LABEL for label in example.labels)
            assert example.input_ids == clean["input_ids"] and example.labels == clean["labels"]
            assert example.corrupted_ids[:length] == example.input_ids[:length]
            assert example.corrupted_ids[length:] != example.input_ids[length:]
            assert len(example.corrupted_ids) == len(example.input_ids)
            assert tokenizer.decode(example.corrupted_ids[length + 1 : length + 5]).strip() in answers

    def test_a_cut_example_has_a_cut_corrupted_one(self, neox: PreTrainedTokenizerFast) -> None:
        records = [Record(f"Where was {name} born?", "In a town by the sea.") for name in ("Kurt Weyl", "Paul Bell")]
        made = corrupt({"forget": records}, neox, max_length=14)["forget"]
        assert [len(example.corrupted_ids) for example in made.examples] == [14, 14]

    def test_none_can_be_made(self, tokenizer: PreTrainedTokenizerFast) -> None:
        alone = {"forget": [Record("Who is Ada?", "A poet.")]}
        with pytest.raises(DataError, match="no record of the forget set can be corrupted, such as record 1"):
            corrupt(alone, tokenizer, corruption="subject")
        with pytest.raises(DataError, match="no other answer"):
            corrupt(alone, tokenizer, corruption="answer")
        with pytest.raises(DataError, match="record 1 of the forget set has no corrupted_prompt"):
            corrupt(alone, tokenizer, corruption="data")
        with pytest.raises(DataError, match="no subject that other records replace"):
            corrupt({"forget": [Record("", "Plain text."), Record("", "More of it.")]}, tokenizer)
        with pytest.raises(UnknownNameError, match="noise"):
            corrupt(alone, tokenizer, corruption="noise")
