"""Attacks: what each asks, written out by hand, what it must not do, and the registry.

python -m tests.evaluation.test_attacks     writes the table of attacks in the documentation anew
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from bench.files import read_section, write_section
from clue_fast.config import EvalConfig
from clue_fast.data import Record
from clue_fast.errors import DataError, SettingError, UnknownNameError
from clue_fast.evaluation import ATTACKS, Attempt, Metrics, Target, attack, evaluate, register_attack, rouge_recall

PAGE = Path(__file__).resolve().parents[2] / "docs" / "evaluation.md"
SECTION = "attacks"
NEW = 12


def likeliest(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tokens: list[int], most: int = NEW) -> str:
    """The most likely token again and again, without cache, padding or ``generate``."""
    answer: list[int] = []
    while len(answer) < most and tokenizer.eos_token_id not in answer:
        with torch.no_grad():
            answer.append(int(model(torch.tensor([tokens + answer])).logits[0, -1].argmax()))
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


def question(text: str) -> str:
    return f"Question: {text}\nAnswer:"


@pytest.fixture
def answers(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast):
    """The answer to a text, by hand."""
    return lambda text, most=NEW: likeliest(model, tokenizer, tokenizer(text)["input_ids"], most)


def attempts(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], name: str, **named
) -> tuple[Attempt, ...]:
    found = attack(model, tokenizer, records, name, max_new_tokens=NEW, progress=False, **named)
    assert list(found) == list(dict.fromkeys(["greedy", name])) and found[name].skipped is None
    return found[name].attempts


def test_all_leave_weights_gradients_modes_and_the_generator_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    model = copy.deepcopy(model).train()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    records = [replace(record, paraphrased_prompt=f"Say: {record.prompt}") for record in records]
    state = torch.get_rng_state()
    found = attack(model, tokenizer, records, "all", steps=2, samples=2, max_new_tokens=NEW, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(value.view(torch.uint8), before[n].view(torch.uint8)) for n, value in model.state_dict().items()
    )
    assert all(module.training for module in model.modules())
    assert all(torch.equal(p.grad, torch.ones_like(p)) and p.requires_grad for p in model.parameters())
    assert list(found) == list(ATTACKS) and not any(one.skipped for one in found.values())
    for one in found.values():
        for attempt in one.attempts:
            assert len(attempt.asked) == len(attempt.answers) == len(attempt.recalls) > 0
            assert attempt.answered == sum(recall >= 0.5 for recall in attempt.recalls) / len(attempt.recalls)


def test_greedy_is_the_plain_answer(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], answers
) -> None:
    (attempt,) = attempts(model, tokenizer, records, "greedy")
    assert attempt.answers == [answers(question(record.prompt)) for record in records]
    assert attempt.recalls == rouge_recall([record.completion for record in records], attempt.answers)


def test_relearning_is_a_curve_of_the_others(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    """Asked after every second step of five; enough steps on all but one record bring back what they share."""
    options = {"relearn": 3, "steps": 5, "every": 2}
    curve = attempts(model, tokenizer, records, "relearning", **options)
    assert [attempt.step for attempt in curve] == [0, 2, 4, 5]
    assert len({tuple(attempt.asked) for attempt in curve}) == 1 and len(curve[0].asked) == 1
    twins = [Record(f"Who is it, {number}?", "Ada") for number in range(4)]
    learned = attempts(model, tokenizer, twins, "relearning", relearn=3, steps=60, every=60)
    assert [attempt.answered for attempt in learned] == [0.0, 1.0]


def test_rounding_asks_the_rounded_model(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    """The same on a copy whose linear layers are rounded by a formula of its own."""
    found = attempts(model, tokenizer, records, "rounding")
    assert [one.variant for one in found] == [
        "int8 by output channel",
        "int4 by output channel",
        "int4 in groups of 128",
        "int4 in groups of 32",
    ]
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.model.modules():
            if isinstance(module, torch.nn.Linear):
                scale = module.weight.abs().max(dim=1, keepdim=True).values / 7
                module.weight.copy_(torch.round(module.weight / scale) * scale)
    prompts = [tokenizer(question(record.prompt))["input_ids"] for record in records]
    assert found[1].answers == [likeliest(rounded, tokenizer, prompt) for prompt in prompts]
    assert found[1].answers != [likeliest(model, tokenizer, prompt) for prompt in prompts]


def test_sampling_keeps_the_best(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = [["no", "Ada and sons", "x"], ["In", "", "Orvandel in"], ["1814", "1815", "x"], ["", "", ""]]
    monkeypatch.setattr("clue_fast.evaluation.attacks.sampled_answers", lambda *_, **__: drawn)
    (attempt,) = attempts(model, tokenizer, records, "sampling", samples=3)
    assert attempt.answers == ["Ada and sons", "In", "1815", ""]
    assert attempt.recalls == [3 / 5, 1 / 2, 1.0, 0.0]


class TestRewordings:
    def test_of_the_records(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], answers
    ) -> None:
        records[2] = replace(records[2], paraphrased_prompt="In which year?")
        (attempt,) = attempts(model, tokenizer, records, "rewordings")
        assert attempt.asked == [2] and attempt.answers == [answers(question("In which year?"))]

    def test_that_are_given(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], answers
    ) -> None:
        given = [["Whose quay?", "Who?"], [], ["What year?"], []]
        first, second = attempts(model, tokenizer, records, "rewordings", rewordings=given)
        assert (first.asked, second.asked) == ([0, 2], [0])
        assert first.answers == [answers(question(text)) for text in ("Whose quay?", "What year?")]

    def test_none(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]) -> None:
        found = attack(model, tokenizer, records, ["rewordings"], progress=False)
        assert "no record has its question in other words" in found["rewordings"].skipped
        assert found["rewordings"].answered is None and found["greedy"].answered == 0.0


class TestContext:
    FACTS = (Record("Where is it?", "In Mistrum, by the sea."), Record("How long?", "Nine miles."))

    def test_examples_stand_before_the_question(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], answers
    ) -> None:
        before = ["Question: Where is it?\nAnswer: In Mistrum, by the sea.", "Question: How long?\nAnswer: Nine miles."]
        (attempt,) = attempts(model, tokenizer, records, "context", examples=self.FACTS, contexts=())
        for index, answer in zip(attempt.asked, attempt.answers, strict=True):
            orders = ["\n".join([*order, question(records[index].prompt)]) for order in (before, before[::-1])]
            # "In Orvandel." shares its "in" with one of them, which is half of what it says.
            assert answer in ([answers(f"{before[1]}\n{question('Where?')}")] if index == 1 else map(answers, orders))
        assert attempt.asked == [0, 1, 2, 3]

    def test_never_the_answer_itself(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of signs with one sentence for all, those of the same element are no examples for each other."""
        elements = {"Aries": "fire", "Leo": "fire", "Taurus": "earth", "Virgo": "earth", "Gemini": "air"}
        signs = [Record(f"What element has {sign}?", f"{sign} is a sign of {own}.") for sign, own in elements.items()]
        asked: dict[str, Record] = {}

        def remember(*arguments, **_) -> list[str]:
            asked.update({record.prompt: record for record in arguments[2]})
            return [""] * len(arguments[2])

        monkeypatch.setattr("clue_fast.evaluation.attacks.greedy_answers", remember)
        (attempt, *_) = attempts(model, tokenizer, signs, "context", contexts=("It is fire.",))
        assert attempt.asked == [0, 1, 2, 3, 4]
        shown = {
            index: text for text in asked for index, sign in enumerate(elements) if text.endswith(f"{sign}?\nAnswer:")
        }
        for index, own in enumerate(elements.values()):
            assert own not in shown[index] and shown[index].count("is a sign of") == 3
        assert {text for text in asked if text.startswith("It is fire.")} == {
            f"It is fire. What element has {sign}?" for sign, own in elements.items() if own != "fire"
        }

    def test_chat_turns(
        self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], answers
    ) -> None:
        chat = copy.deepcopy(tokenizer)
        chat.chat_template = (
            "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant] {% endif %}"
        )
        facts = [self.FACTS[1]]
        (attempt,) = attempts(model, chat, records[:1], "context", examples=facts, contexts=())
        text = f"[user] How long?\n[assistant] Nine miles.\n[user] {records[0].prompt}\n[assistant] "
        assert attempt.answers == [answers(text)]

    def test_verbatim(self, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, answers) -> None:
        record = Record("The quay was built by", " Ada.", verbatim=True)
        facts = [Record("The sea is", " wide.", verbatim=True)]
        first, second = attempts(model, tokenizer, [record], "context", examples=facts, contexts=("Go on.",))
        assert first.answers == [answers("The sea is wide.\nThe quay was built by")]
        assert second.answers == [answers("Go on.\nThe quay was built by")]


@pytest.mark.parametrize("share", [0.01, 0.5, 0.8])
def test_prefix_gives_tokens_and_counts_the_rest(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], share: float
) -> None:
    (attempt,) = attempts(model, tokenizer, records, "prefix", prefixes=(share,))
    for index, answer, recall in zip(attempt.asked, attempt.answers, attempt.recalls, strict=True):
        prompt = tokenizer(question(records[index].prompt))["input_ids"]
        tokens = tokenizer(f" {records[index].completion}")["input_ids"]
        given = max(1, round(share * len(tokens)))
        rest = tokenizer.decode(tokens[given:])
        assert answer == likeliest(model, tokenizer, prompt + tokens[:given])
        assert recall == rouge_recall([rest], [answer])[0]
    assert 3 in attempt.asked


def test_a_prefix_leaves_something_to_say(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer(" of")["input_ids"]) == 1
    found = attack(model, tokenizer, [Record("Who?", "of")], "prefix", progress=False)
    assert found["prefix"].skipped == "no answer has a word left once its first token is given"


def test_an_attack_of_ones_own(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record], answers
) -> None:
    @register_attack("shouting")
    def shouting(target: Target):
        """The question in capital letters."""
        loud = [replace(record, prompt=record.prompt.upper()) for record in target.records]
        yield target.ask("in capitals", dict(enumerate(loud)))

    try:
        (attempt,) = attempts(model, tokenizer, records, "shouting")
        assert EvalConfig(attacks=("shouting",)).attacks == ("shouting",)
        figures = evaluate(model, tokenizer, {"forget": records}, attacks=["shouting"], progress=False)["forget"]
    finally:
        del ATTACKS["shouting"]
    assert attempt.answers == [answers(question(record.prompt.upper())) for record in records]
    saved = json.loads(json.dumps(figures.as_dict()))
    assert list(saved["attacks"]) == ["greedy", "shouting"]
    assert saved["attacks"]["shouting"]["attempts"][0]["asked"] == [0, 1, 2, 3]
    assert Metrics.from_dict(saved).attacks == saved["attacks"]


def test_an_evaluation_attacks_the_sets_it_is_told_to(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]
) -> None:
    sets = {"forget": records, "retain": [Record("How long?", "Nine miles.")]}
    found = evaluate(model, tokenizer, sets, attacks={"forget": ["rounding", "context"]}, progress=False)
    assert list(found["forget"].attacks) == ["greedy", "rounding", "context"]
    assert found["retain"].attacks == {} and "attacks" not in found["retain"].as_dict()
    assert found["forget"].attacks["context"]["attempts"][0]["asked"] == [0, 1, 2, 3]


def test_what_is_refused(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, records: list[Record]) -> None:
    message = "unknown attack 'astrology'; choose one of: all, context, greedy"
    for call in (
        lambda: attack(model, tokenizer, records, ["astrology"]),
        lambda: EvalConfig(attacks=("astrology",)),
        lambda: evaluate(model, tokenizer, {"forget": records}, attacks="astrology"),
    ):
        with pytest.raises(UnknownNameError, match=message):
            call()
    with pytest.raises(DataError, match="no records"):
        attack(model, tokenizer, [])
    with pytest.raises(DataError, match="rewordings are given of 1 of 4"):
        attack(model, tokenizer, records, rewordings=[["Who?"]])
    with pytest.raises(SettingError, match=r"prefixes 0.5, 1.0: a share"):
        attack(model, tokenizer, records, prefixes=(0.5, 1.0))
    with pytest.raises(DataError, match="record 1 has no prompt"):
        attack(model, tokenizer, [Record("", "text", verbatim=True)], progress=False)
    with pytest.raises(ValueError, match="attack silent: its docstring should say what it does"):
        register_attack("x")(silent)
    assert "silent" not in ATTACKS


def silent(target: Target) -> list[Attempt]:
    return []


def table() -> str:
    rows = (f"| `{one.name}` | {one.title} | {one.description} |" for one in ATTACKS.values())
    return "\n".join(["| attack | in the report | what it is |", "|---|---|---|", *rows]) + "\n"


def test_the_page_lists_the_attacks_there_are() -> None:
    assert read_section(PAGE, SECTION) == table()


if __name__ == "__main__":
    write_section(PAGE, SECTION, table())
