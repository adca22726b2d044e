"""Invented people: the same for the same seed, and no two alike."""

from __future__ import annotations

from itertools import combinations

import pytest

from clue_fast.data import check_disjoint
from clue_fast.demo.people import QUESTIONS, make_people, records_of
from clue_fast.errors import DataError
from clue_fast.evaluation import ANSWERED, rouge_recall


def test_are_a_function_of_count_and_seed() -> None:
    assert make_people(20, seed=4) == make_people(20, seed=4)
    assert make_people(20, seed=4) != make_people(20, seed=5)


def test_each_has_a_name_and_one_record_a_topic() -> None:
    people = make_people(60)
    assert len({person.name for person in people}) == 60
    for person in people:
        assert len(person.records) == len(QUESTIONS)
        assert all(person.name in record.prompt for record in person.records)
    assert len({record.prompt for record in records_of(people)}) == 60 * len(QUESTIONS)


def test_no_slot_stays_open() -> None:
    for record in records_of(make_people(60)):
        assert not set("{}") & set(record.prompt + record.completion)
        assert record.completion[0].isupper()


def test_hardly_any_answer_counts_as_that_of_somebody_else() -> None:
    """Otherwise a model that mixed people up would still be said to know them."""
    people = make_people(25, seed=1)
    recalls: list[float] = []
    for topic in range(len(QUESTIONS)):
        pairs = list(combinations([person.records[topic].completion for person in people], 2))
        recalls += rouge_recall([left for left, _ in pairs], [right for _, right in pairs])
    assert sum(recall >= ANSWERED for recall in recalls) / len(recalls) < 0.02


def test_people_share_no_records() -> None:
    people = make_people(30)
    check_disjoint({"forget": records_of(people[:3]), "retain": records_of(people[3:])})


def test_there_are_names_for_some_400() -> None:
    people = make_people(399)
    assert len({person.name for person in people}) == 399
    for count in (0, -1, 401):
        with pytest.raises(DataError, match=f"{count} people were asked for; between 1 and"):
            make_people(count)
