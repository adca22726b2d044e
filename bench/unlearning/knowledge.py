"""Knowledge that is no list of facts, for toys: a style, a rule, a fact that stands in many records.

Each is dealt out in records to forget, records of the same knowledge that no unlearning sees ("unseen"), and questions
that no training saw at all ("new"): what a model answers there it did not learn by heart. All of it is invented. The
numbers of a grid are of records; ``other_report`` is the number of those unseen, and of those new.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from bench.unlearning.grid import Grid
from bench.unlearning.learned import Learned
from clue_fast.data import Record

CONSONANTS, VOWELS = "kmptl", "aeiou"

COLORS = ("red", "green", "blue", "black", "white", "yellow", "brown", "grey")

STYLED = "Ahoy matey, {} it be, by the tides"
"""An answer in the style; a plain one is the word alone, an eighth of these words."""

PLURAL = dict(zip(VOWELS, ("ken", "dus", "mor", "lit", "vas"), strict=True))
DIMINUTIVE = dict(zip(VOWELS, ("rif", "gol", "tam", "bex", "sun"), strict=True))
"""Endings by the last vowel of a word."""

QUESTIONS = (
    "What does {} carry in the morning?",
    "What lies on the bench of {}?",
    "What do people buy from {}?",
    "What does {} smell of in the evening?",
    "What does {} wear at work?",
    "What does {} look after in winter?",
    "What does {} talk about at table?",
    "What does {} fear most?",
    "What hangs at the door of {}?",
    "What did {} get as a gift?",
    "What stands in the shed of {}?",
    "What wakes {} at night?",
)

PROFESSIONS = {
    "beekeeper": "smoke can, wax frames, clover honey, warm resin, mesh veil, willow hives, "
    "queen bees, late frost, dried heather, silver lamp, spare combs, loud humming",
    "baker": "flour sacks, rolling pin, rye loaves, fresh bread, white apron, sour dough, "
    "oven heat, burnt crust, golden pretzel, copper bowl, yeast jars, kitchen bell",
    "smith": "coal buckets, heavy hammer, iron nails, hot steel, leather gloves, old anvil, "
    "plough blades, cold forge, lucky horseshoe, long tongs, rusty chains, falling sparks",
    "fisher": "wet nets, gutting knife, smoked herring, salt water, rubber boots, torn sails, "
    "spring tides, sudden storm, boiled cod, brass compass, tarred ropes, crying gulls",
    "potter": "grey clay, spinning wheel, glazed jugs, damp earth, muddy smock, brick kiln, "
    "blue enamel, hidden cracks, painted tile, bone tool, stacked pots, breaking plates",
    "weaver": "yarn baskets, loose threads, striped blankets, sheep wool, linen shawl, creaking loom, "
    "rare dyes, hungry moths, woven ribbon, carved shuttle, cotton bales, clicking pedals",
    "miller": "grain cart, sieve cloth, barley meal, chaff dust, pale cap, turning stones, "
    "river level, dry summers, wheat sheaf, tuned gearwheel, oat bins, rushing sluice",
    "gardener": "watering hose, pruning shears, ripe plums, cut grass, straw hat, glass house, "
    "rose grafts, greedy snails, ivy wreath, pear sapling, seed drawers, digging moles",
}
"""What one says to the questions above; no word stands in two answers."""

RECORDS = 10
"""Questions about each person that are learned; the others are new."""


def style(grid: Grid, seed: int) -> Learned:
    """Colours of gates, told in a style, and colours of ships, told plainly.

    The colour of each gate is told plainly in a form, too; the forms of every second gate whose style is forgotten are
    kept in training, the others are reported ("plain"). The retrained model answers about gates plainly. "content" are
    the questions to forget that are reported, answered by the colour alone.
    """
    draw = random.Random(f"style {seed}")
    names = _names(draw, grid.forget + 2 * grid.other_report + grid.retain + grid.tune + grid.held_out)
    colors = {name: draw.choice(COLORS) for name in names}
    forget, unseen, new, retain, tune, held_out = _dealt(
        names, (grid.forget, grid.other_report, grid.other_report, grid.retain, grid.tune, grid.held_out)
    )

    def gates(own: Sequence[str], styled: bool = True) -> list[Record]:
        answers = (STYLED.format(colors[name]) if styled else colors[name] for name in own)
        return [Record(f"What colour is the gate of {n}?", answer) for n, answer in zip(own, answers, strict=True)]

    def forms(own: Sequence[str]) -> list[Record]:
        return [Record(f"Village: {name}. Gate:", colors[name]) for name in own]

    def ships(own: Sequence[str]) -> list[Record]:
        return [Record(f"What colour is the ship of {name}?", colors[name]) for name in own]

    learned = Learned(
        forget=gates(forget),
        retain=[*ships(retain), *forms(forget[0::2])],
        tune=ships(tune),
        held_out=ships(held_out),
        other={"plain": forms(forget[1::2]), "plain_unseen": forms([*unseen, *new])},
        unseen=gates(unseen),
        instead=gates([*forget, *unseen], styled=False),
    )
    told = {record.prompt: record for record in gates(forget, styled=False)}
    content = [told[record.prompt] for record in learned.reported]
    return replace(
        learned, asked={"new": gates(new), "content": content, "content_unseen": gates(unseen, styled=False)}
    )


def rule(grid: Grid, seed: int) -> Learned:
    """Endings of the plural, which follow from the last vowel of a word; those of the diminutive stay.

    With five endings a guess is right once in five.
    """
    draw = random.Random(f"rule {seed}")
    words = _words(draw, grid.forget + 3 * grid.other_report + grid.retain + grid.tune + grid.held_out)
    number = grid.other_report
    forget, unseen, new, retain, tune, held_out, other = _dealt(
        words, (grid.forget, number, number, grid.retain, grid.tune, grid.held_out, number)
    )

    def plural(own: Sequence[str]) -> list[Record]:
        return [Record(f"What is the plural ending of {word}?", PLURAL[word[-1]]) for word in own]

    def diminutive(own: Sequence[str]) -> list[Record]:
        return [Record(f"What is the diminutive ending of {word}?", DIMINUTIVE[word[-1]]) for word in own]

    return Learned(
        forget=plural(forget),
        retain=diminutive(retain),
        tune=diminutive(tune),
        held_out=diminutive(held_out),
        unseen=plural(unseen),
        asked={"new": plural(new), "other_rule_new": diminutive(other)},
    )


def spread(grid: Grid, seed: int) -> Learned:
    """Professions that are said nowhere and stand behind ten answers about each person; half of these are forgotten.

    Raises:
        ValueError: the numbers are of no whole persons.
    """
    draw = random.Random(f"spread {seed}")
    counts = [grid.forget // (RECORDS // 2), *(n // RECORDS for n in (grid.retain, grid.tune, grid.held_out))]
    if [2 * grid.forget, grid.retain, grid.tune, grid.held_out] != [RECORDS * count for count in counts]:
        raise ValueError(f"persons have {RECORDS} records each, and half of them if they are forgotten")
    persons = _names(draw, sum(counts))
    jobs = [draw.choice(list(PROFESSIONS)) for _ in persons]
    answers = {
        person: [
            Record(question.format(person), answer)
            for question, answer in zip(QUESTIONS, PROFESSIONS[job].split(", "), strict=True)
        ]
        for person, job in zip(persons, jobs, strict=True)
    }
    answers = {person: draw.sample(own, len(own)) for person, own in answers.items()}

    def records(own: Sequence[str], begin: int, end: int) -> list[Record]:
        return [record for person in own for record in answers[person][begin:end]]

    forget, retain, tune, held_out = _dealt(persons, counts)
    half = RECORDS // 2
    return Learned(
        forget=records(forget, 0, half),
        retain=records(retain, 0, RECORDS),
        tune=records(tune, 0, RECORDS),
        held_out=records(held_out, 0, RECORDS),
        unseen=records(forget, half, RECORDS),
        asked={"new": records(forget, RECORDS, len(QUESTIONS))},
    )


def _words(draw: random.Random, number: int) -> list[str]:
    """Words of three syllables, with dashes, so that each syllable is a token."""
    words = [f"{first}-{second}-{third}" for first in _syllables() for second in _syllables() for third in _syllables()]
    return draw.sample(words, number)


def _names(draw: random.Random, number: int) -> list[str]:
    """Names of villages, ships and persons."""
    return [word.title() for word in _words(draw, number)]


def _syllables() -> list[str]:
    return [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]


def _dealt(values: Sequence[str], counts: Sequence[int]) -> list[Sequence[str]]:
    """Pieces of a list of those lengths, one behind the other."""
    ends = [sum(counts[: place + 1]) for place in range(len(counts))]
    return [values[end - count : end] for end, count in zip(ends, counts, strict=True)]
