"""The demo on a real language model: it forgets facts of its pretraining and is asked what else went, what comes back.

Which facts the model knows is found out first; only those are forgotten, kept or counted. What it is asked before and
after: the forgotten facts as they were trained, in other words and the other way round, facts of the same kind and of
other kinds that took no part, and a general text. Then it is attacked: answers are sampled, and a copy learns half of
the forgotten facts again and is asked the other half, beside facts that the model never knew.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clue_fast.data import Record
from clue_fast.demo.facts import FACTS, Fact, completes, known_facts, says
from clue_fast.demo.pretrained import load_pretrained
from clue_fast.demo.prose import TOKENS, WINDOW, general_text
from clue_fast.errors import DataError
from clue_fast.evaluation import answered, greedy_answers, perplexity, relearn
from clue_fast.files import check_output, save_json
from clue_fast.tables import markdown
from clue_fast.unlearning import unlearn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MODEL = "smollm2-135m"
FORGOTTEN = 6
RETAINED = 24
"""Known facts to keep of the same kind, and as many of all others, that take part in training."""

HELD_OUT = 40
UNKNOWN = 12
SAMPLES = 20
RELEARNING_RATE = 1e-5
"""Of the copy that is attacked. At the default of ``relearn``, 3.5e-4 for this width, seed 10 lost what it still knew,
and nothing came back; at 1e-5 and 3e-5 two of three facts did."""

ANSWER_TOKENS = 10
"""Longest answer that is looked at, for an answer that comes after a few words."""

EXAMPLES = 4
"""Answers side by side of each title, beside those of all forgotten facts."""

CELL = 44
REPORT = "real.json"
TRAINED = "forgotten, as trained"

SETTINGS: dict[str, Any] = {"epochs": 30, "retain_ratio": 2}
"""Of ``unlearn``, all else at its default: fewer steps and fewer records in each, for a demo of minutes. Tried on seeds
10 and 11, of which nothing is reported."""


@dataclass(frozen=True)
class RealData:
    """Facts by what is to become of them; all but the unknown ones are known to the model.

    Attributes:
        forget: what is to be forgotten.
        retain: what is kept and takes part in training, of all kinds.
        held_out: of the kinds that are forgotten; they take no part.
        other_kinds: of the other kinds; they take no part.
        left_out: what was asked to be forgotten and is not known.
        unknown: of the kinds that are forgotten, and not known, in random order: what comes of them by chance.
    """

    forget: list[Fact]
    retain: list[Fact]
    held_out: list[Fact]
    other_kinds: list[Fact]
    left_out: list[Fact]
    unknown: list[Fact]


@dataclass(frozen=True)
class Question:
    """A record to ask, and what counts as its answer."""

    record: Record
    accepted: tuple[str, ...]


@dataclass(frozen=True)
class Answers:
    """What a model said to the same questions before and after.

    Attributes:
        title: what was asked.
        questions: of a title.
        before, after: the answers.
    """

    title: str
    questions: list[Question]
    before: list[str]
    after: list[str]

    @property
    def counts(self) -> tuple[int, int, int]:
        """How many were answered rightly before, how many of these are after, and how many were asked."""
        pairs = [
            (says(before, one.accepted), says(after, one.accepted))
            for one, before, after in zip(self.questions, self.before, self.after, strict=True)
        ]
        return sum(before for before, _ in pairs), sum(before and after for before, after in pairs), len(pairs)

    def as_rows(self) -> list[dict[str, str]]:
        """Prompt, right answer and both answers of each question, ready for JSON."""
        return [
            {"prompt": one.record.prompt, "answer": one.record.completion.strip(), "before": before, "after": after}
            for one, before, after in zip(self.questions, self.before, self.after, strict=True)
        ]


def choose_facts(wanted: str) -> list[Fact]:
    """The facts that a text names: kinds, subjects, or both as KIND:SUBJECT, with commas between.

    Raises:
        DataError: nothing is named so, or two kinds have that subject.
    """
    return [fact for part in wanted.split(",") for fact in _named(part.strip())]


def _named(name: str) -> Sequence[Fact]:
    if name in FACTS:
        return FACTS[name]
    kind, _, subject = name.rpartition(":")
    found = [fact for own in FACTS.values() for fact in own if fact.subject == subject and kind in ("", fact.kind)]
    if len(found) > 1:
        raise DataError(f"{name!r} is a subject of several kinds; write {found[0].kind}:{name}")
    if not found:
        raise DataError(
            f"no fact is named {name!r}; name a kind ({', '.join(FACTS)}) or a subject such as France or author:Walden"
        )
    return found


def make_real_data(known: Sequence[Fact], forget: str = "capital", seed: int = 0) -> RealData:
    """Deals out the facts that a model knows.

    Args:
        known: those that it knows, of all kinds.
        forget: kinds, of each of which six are drawn, or single facts, see ``choose_facts``.
        seed: of who is dealt what.

    Raises:
        DataError: see ``choose_facts``; or the model knows none of what is to be forgotten, or nothing else.
    """
    choice = random.Random(f"{seed} facts")
    shuffled = choice.sample(known, len(known))
    wanted, left_out = [], []
    for part in forget.split(","):
        named = choose_facts(part)
        if part.strip() in FACTS:
            wanted += [fact for fact in shuffled if fact in named][:FORGOTTEN]
        else:
            wanted += [fact for fact in named if fact in known]
            left_out += [fact for fact in named if fact not in known]
    wanted = list(dict.fromkeys(wanted))
    kinds = {fact.kind for fact in choose_facts(forget)}
    if not wanted:
        raise DataError(f"the model knows none of the facts to forget ({forget}); choose others or another model")
    rest = [fact for fact in shuffled if fact not in wanted]
    same, others = ([fact for fact in rest if (fact.kind in kinds) == of_kinds] for of_kinds in (True, False))
    retained = min(RETAINED, len(same) // 2), min(RETAINED, len(others) // 2)
    if not sum(retained):
        raise DataError(f"beside {forget} the model knows too little to keep; forget less or choose another model")
    unknown = [fact for kind in FACTS if kind in kinds for fact in FACTS[kind] if fact not in known]
    return RealData(
        forget=wanted,
        retain=same[: retained[0]] + others[: retained[1]],
        held_out=same[retained[0] :][:HELD_OUT],
        other_kinds=others[retained[1] :][:HELD_OUT],
        left_out=left_out,
        unknown=choice.sample(unknown, len(unknown)),
    )


def make_questions(data: RealData) -> dict[str, list[Question]]:
    """What the model is asked before and after, by title."""

    def stated(facts: Sequence[Fact]) -> list[Question]:
        return [Question(fact.record(), fact.accepted) for fact in facts]

    return {
        TRAINED: stated(data.forget),
        "forgotten, in other words": [
            Question(record, fact.accepted) for fact in data.forget for record in fact.rewordings()
        ],
        "forgotten, the other way round": [Question(fact.reverse(), (fact.subject,)) for fact in data.forget],
        "same kind, held out": stated(data.held_out),
        "other kinds, held out": stated(data.other_kinds),
    }


def run_real_demo(
    output_dir: str | os.PathLike[str],
    *,
    model: str = MODEL,
    forget: str = "capital",
    models: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> str:
    """Fetches a model, finds out what it knows, lets it forget some of it, and asks and attacks it.

    Args:
        output_dir: new or empty folder for the checkpoint and the evidence, see ``clue_fast.unlearn``, and besides
            ``real.json`` and one file of JSON lines a set.
        model: a key of ``clue_fast.demo.pretrained.PRETRAINED``.
        forget: what to forget, see ``choose_facts``.
        models: where the model is kept once it is fetched; default ``clue-fast`` in the user's cache folder.
        seed: of what is forgotten and kept, and of everything else.
        progress: show progress bars.
        settings: of ``unlearn``, in place of ``SETTINGS``.

    Returns:
        The tables of results.

    Raises:
        OutputError: the folder is not empty.
        DataError: the model knows nothing of what is to be forgotten, or there is no such fact.
        ModelError: the model cannot be fetched.
    """
    check_output(output_dir)
    choose_facts(forget)
    loaded, tokenizer = load_pretrained(model, models or default_models_dir())
    return run_on(loaded, tokenizer, output_dir, forget, title=model, seed=seed, progress=progress, **settings)


def default_models_dir() -> Path:
    """The folder ``clue-fast`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clue-fast"


def run_on(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output_dir: str | os.PathLike[str],
    forget: str,
    *,
    title: str,
    seed: int,
    progress: bool,
    **settings: Any,
) -> str:
    """The demo on a model that is loaded; see ``run_real_demo``."""
    started = time.perf_counter()
    known = known_facts(model, tokenizer, [fact for facts in FACTS.values() for fact in facts])
    data = make_real_data(known, forget, seed)
    logger.info("%s", _knowledge(title, known))
    logger.info("it forgets %s", ", ".join(f"{fact.kind}:{fact.subject}" for fact in data.forget))
    if data.left_out:
        logger.warning("not known to it, and left out: %s", ", ".join(fact.subject for fact in data.left_out))
    questions = make_questions(data)
    text_name, text = general_text()

    def asked() -> tuple[dict[str, list[str]], float]:
        """The answers by title, and the perplexity of the general text."""
        answers = {
            name: greedy_answers(
                model,
                tokenizer,
                [one.record for one in own],
                max_new_tokens=ANSWER_TOKENS,
                progress=progress,
                description=name,
            )
            for name, own in questions.items()
            if own
        }
        return answers, perplexity(model, tokenizer, text, tokens=TOKENS, window=WINDOW, progress=progress)

    data = replace(data, unknown=never_known(model, tokenizer, data.unknown, progress)[:UNKNOWN])
    before, perplexity_before = asked()
    sets = {name: [fact.record() for fact in getattr(data, name)] for name in ("forget", "retain", "held_out")}
    result = unlearn(
        model,
        tokenizer,
        forget=sets["forget"],
        retain=sets["retain"],
        held_out=sets["held_out"] or None,
        output_dir=output_dir,
        samples=SAMPLES,
        seed=seed,
        progress=progress,
        **{**SETTINGS, **settings},
    )
    after, perplexity_after = asked()
    answers = [Answers(name, questions[name], before[name], after[name]) for name in before]
    relearned = _relearned(model, tokenizer, data, progress)
    report: dict[str, Any] = {
        "model": title,
        "known": {kind: [fact.subject for fact in known if fact.kind == kind] for kind in FACTS},
        "facts": {name: [asdict(fact) for fact in facts] for name, facts in vars(data).items()},
        "answers": {one.title: one.as_rows() for one in answers},
        "counts": {one.title: one.counts for one in answers},
        "perplexity": {"text": text_name, "before": perplexity_before, "after": perplexity_after},
        "relearning": relearned,
        "seconds": time.perf_counter() - started,
    }
    for name, records in sets.items():
        write_completions(result.output_dir / f"{name}.jsonl", records)
    save_json(result.output_dir / REPORT, report)
    logger.info("demo: %.1f s, everything is in %s", report["seconds"], output_dir)
    return "\n\n".join([_knowledge(title, known), *tables(report), result.table()])


def write_completions(path: Path, records: Sequence[Record]) -> None:
    """Writes statements as JSON lines, as the command line reads them."""
    rows = ({"prompt": one.prompt, "completion": one.completion, "open_ended": True} for one in records)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")


def never_known(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], progress: bool = False
) -> list[Fact]:
    """The facts whose answer no wording brings out at once, nor the statement a few words later.

    One wording is not enough: a model that goes on with "the capital of Egypt" may still say Cairo when it is asked
    otherwise, and does so behind "is" after a few steps on any capitals.
    """
    asked = [(fact, record) for fact in facts for record in (fact.record(), *fact.rewordings())]
    right = completes(model, tokenizer, [record for _, record in asked])
    said = {fact for (fact, _), known in zip(asked, right, strict=True) if known}
    unsaid = [fact for fact in facts if fact not in said]
    records = [fact.record() for fact in unsaid]
    answers = greedy_answers(model, tokenizer, records, max_new_tokens=ANSWER_TOKENS, progress=progress)
    return [fact for fact, text in zip(unsaid, answers, strict=True) if not says(text, fact.accepted)]


def _relearned(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: RealData, progress: bool
) -> dict[str, Any] | None:
    """A copy learns half of the forgotten facts again and is asked the others, and what the model never knew.

    None where only one fact was forgotten.
    """
    half = len(data.forget) // 2
    if not half:
        return None
    taught, others = data.forget[:half], data.forget[half:]
    done = relearn(
        model,
        tokenizer,
        [fact.record() for fact in taught],
        [fact.record() for fact in others + data.unknown],
        learning_rate=RELEARNING_RATE,
        max_new_tokens=ANSWER_TOKENS,
        progress=progress,
    )
    split = len(others)
    return {
        "records": done.records,
        "steps": done.steps,
        "learning_rate": done.learning_rate,
        "forgotten": [answered(done.recalls_before[:split]), answered(done.recalls_after[:split]), split],
        "never_known": [
            answered(done.recalls_before[split:]),
            answered(done.recalls_after[split:]),
            len(data.unknown),
        ],
    }


def _knowledge(title: str, known: Sequence[Fact]) -> str:
    counts = (f"{sum(fact.kind == kind for fact in known)} of {len(facts)} {kind}s" for kind, facts in FACTS.items())
    return f"{title} knows " + ", ".join(counts)


def tables(report: Mapping[str, Any]) -> Iterator[str]:
    """What ``real.json`` says: what was forgotten and kept, answers side by side, and then general text and attack."""
    rows = [["asked", "right before", "still right", "of"]]
    rows += [[title, *map(str, counts)] for title, counts in report["counts"].items()]
    yield markdown(rows)
    rows = [["prompt", "before", "after"]]
    for title, own in report["answers"].items():
        shown = own if title == TRAINED else own[:: math.ceil(len(own) / EXAMPLES)]
        rows += [[_line(one[column]) for column in rows[0]] for one in shown]
    yield markdown(rows, left=3)
    lines = []
    if left_out := report["facts"]["left_out"]:
        names = ", ".join(fact["subject"] for fact in left_out)
        lines.append(f"never known, left out of every rate: {names}")
    text = report["perplexity"]
    change = text["after"] / text["before"]
    lines.append(
        f"perplexity on {text['text']}: {text['before']:.2f} before, {text['after']:.2f} after ({change:.3f}x)"
    )
    if attack := report["relearning"]:
        lines.append(
            f"relearning {attack['records']} of the forgotten facts in {attack['steps']} steps: "
            + "; ".join(
                f"of {number} {which} {before:.0%} are answered before and {after:.0%} after"
                for which, (before, after, number) in (
                    ("others of them", attack["forgotten"]),
                    ("not known before", attack["never_known"]),
                )
                if number
            )
        )
    yield "\n".join(lines)


def _line(text: str) -> str:
    """A text in a cell: one line, not too long."""
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= CELL else f"{line[: CELL - 1]}…"
