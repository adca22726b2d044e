"""Prompt and answer as the tokens of one text, for the kinds of tokenizers and chat templates that models come with.

The reference is the definition: the whole text, written out here by hand, is tokenized once by the library
`tokenizers`, and a token is the answer's if it holds a character of the answer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clue_fast.cli import main
from clue_fast.data import Record, encode, encode_prompts, load_records
from clue_fast.errors import DataError
from clue_fast.evaluation import greedy_answers, score_answers

RECORDS = [
    Record("What does Ada do?", "A cook. She cooks every day."),
    Record("Where does she live?", "In Paris, near the old quay."),
    Record("Quel âge a-t-elle ?", "Trente-sept ans, née à Noël."),
]
CORPUS = [f"Question: {r.prompt}\nAnswer: {r.completion} user assistant [INST] [/INST]" for r in RECORDS] * 4
SPECIAL = [
    *("<s>", "</s>", "<unk>", "[CLS]", "[SEP]", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|user|>", "<|assistant|>", "<|end|>"),
]


def byte_level(trim_offsets: bool | None = None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if trim_offsets is not None:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = start_token("<s>")
    return tokenizer


def prepended() -> Tokenizer:
    """As Llama 2 came at first: a ▁ in front of every stretch between special tokens, and the space is a ▁."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    words = (word for line in CORPUS for word in line.split(" "))
    tokenizer.train_from_iterator(
        words, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    )
    tokenizer.post_processor = start_token("<s>")
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def start_token(token: str) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, SPECIAL.index(token))])


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "byte-level BPE, blanks not in offsets": lambda: byte_level(trim_offsets=True),
    "metaspace, always": lambda: metaspace("always"),
    "metaspace, first": lambda: metaspace("first"),
    "metaspace, never": lambda: metaspace("never"),
    "prepended metaspace": prepended,
    "WordPiece": word_piece,
    "Unigram": unigram,
}


@pytest.fixture(scope="module")
def made() -> Callable[[str], Tokenizer]:
    known: dict[str, Tokenizer] = {}

    def make(name: str) -> Tokenizer:
        return known.setdefault(name, known[name] if name in known else TOKENIZERS[name]())

    return make


def wrapped(tokenizer: Tokenizer, **settings: str) -> PreTrainedTokenizerFast:
    settings = {"eos_token": "</s>", "unk_token": "<unk>", **settings}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.to_str()), **settings)


def by_definition(tokenizer: Tokenizer, text: str, start: int, special: bool) -> tuple[list[int], list[int]]:
    """Tokens and labels of a whole text: labelled is what holds a character of the answer, or follows it."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    if type(plain.post_processor) is processors.ByteLevel:
        plain.post_processor = processors.ByteLevel(trim_offsets=False)  # offsets of every character
    whole = plain.encode(text, add_special_tokens=special)
    holds = [any(place >= start for place in range(*span)) for span in whole.offsets]
    first = holds.index(True)
    return whole.ids, [-100] * first + whole.ids[first:]


@dataclass(frozen=True)
class Template:
    """A chat template, and what it makes of a question and an answer: text up to the answer's turn, the answer's turn
    to its end, and what follows."""

    jinja: str
    writes: Callable[[str, str], tuple[str, str, str]]
    bos: str = "<s>"
    eos: str = "</s>"


TEMPLATES = {
    "llama2": Template(
        "{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 is even) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content.strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
        lambda q, a: (f"<s>[INST] {q} [/INST]", f" {a} </s>", ""),
    ),
    "llama3": Template(
        "{% for m in messages %}{{ bos_token if loop.first }}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        lambda q, a: (
            f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{q}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
            f"{a}<|eot_id|>",
            "",
        ),
        bos="<|begin_of_text|>",
        eos="<|endoftext|>",
    ),
    "mistral": Template(
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 is even) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token + ' ' }}"
        "{% endif %}{% endfor %}",
        lambda q, a: (f"<s>[INST] {q} [/INST]", f"{a}</s>", " "),
    ),
    "zephyr": Template(
        "{% for m in messages %}\n{{ '<|' + m.role + '|>\n' + m.content + eos_token }}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
        lambda q, a: (f"<|user|>\n{q}</s>\n<|assistant|>\n", f"{a}</s>", "\n"),
    ),
    "chatml": Template(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        lambda q, a: (f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n", f"{a}<|im_end|>", "\n"),
        eos="<|endoftext|>",
    ),
    "gemma": Template(
        "{{ bos_token }}{% for m in messages %}"
        "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        lambda q, a: (
            f"<bos><start_of_turn>user\n{q}<end_of_turn>\n<start_of_turn>model\n",
            f"{a}<end_of_turn>",
            "\n",
        ),
        bos="<bos>",
    ),
    "phi3": Template(
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}",
        lambda q, a: (f"<|user|>\n{q}<|end|>\n<|assistant|>\n", f"{a}<|end|>", "\n<|endoftext|>"),
        eos="<|endoftext|>",
    ),
}


class TestTheWholeTextIsTokenizedOnce:
    @pytest.mark.parametrize(("kind", "template"), list(product(TOKENIZERS, TEMPLATES)))
    def test_chat(self, made: Callable[[str], Tokenizer], kind: str, template: str) -> None:
        chat = TEMPLATES[template]
        tokenizer = wrapped(made(kind), bos_token=chat.bos, eos_token=chat.eos, chat_template=chat.jinja)
        examples = encode(RECORDS, tokenizer)
        for record, example in zip(RECORDS, examples, strict=True):
            asked, answered, rest = chat.writes(record.prompt, record.completion)
            turns = [{"role": "user", "content": record.prompt}, {"role": "assistant", "content": record.completion}]
            assert tokenizer.apply_chat_template(turns, tokenize=False) == asked + answered + rest
            ids, labels = by_definition(made(kind), asked + answered, len(asked), special=False)
            whole = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
            assert example["input_ids"] == ids == whole[: len(ids)]
            assert example["labels"] == labels
            (open_ended,) = encode([replace(record, open_ended=True)], tokenizer)
            said = answered[: answered.index(record.completion) + len(record.completion)]
            ids, labels = by_definition(made(kind), asked + said, len(asked), special=False)
            assert (open_ended["input_ids"], open_ended["labels"]) == (ids, labels)
        prompts = encode_prompts(RECORDS, tokenizer)
        assert prompts == [example["input_ids"][: example["labels"].count(-100)] for example in examples]

    @pytest.mark.parametrize("kind", TOKENIZERS)
    @pytest.mark.parametrize(
        "record",
        [
            Record("What does Ada do?", "A cook. She cooks every day."),
            Record("What does Ada do? A", " cook.", verbatim=True),
            Record("What does Ada do? A ", "cook.", verbatim=True),
            Record("Où ? ", "À Paris", verbatim=True),
            Record("", "Ada cooks every day.", verbatim=True),
        ],
    )
    def test_without_a_template(self, made: Callable[[str], Tokenizer], kind: str, record: Record) -> None:
        tokenizer = wrapped(made(kind), bos_token="<s>", sep_token="[SEP]")
        asked, answered = record.prompt, record.completion
        if not record.verbatim:
            asked, answered = f"Question: {asked}\nAnswer:", f" {answered}"
        ids, labels = by_definition(made(kind), asked + answered, len(asked), special=True)
        if kind != "WordPiece":  # which ends a text by itself
            ids, labels = ([*tokens, SPECIAL.index("</s>")] for tokens in (ids, labels))
        (example,) = encode([record], tokenizer)
        assert (example["input_ids"], example["labels"]) == (ids, labels)

    @pytest.mark.parametrize("kind", TOKENIZERS)
    @pytest.mark.parametrize("verbatim", [True, False])
    def test_an_open_ended_answer_is_the_last(
        self, made: Callable[[str], Tokenizer], kind: str, verbatim: bool
    ) -> None:
        """Also where the tokenizer puts an end behind a text by itself, as WordPiece does."""
        tokenizer = wrapped(made(kind), bos_token="<s>", sep_token="[SEP]")
        record = Record("What does Ada do? A", " cook.", verbatim=verbatim)
        (example,), (ended,) = encode([replace(record, open_ended=True)], tokenizer), encode([record], tokenizer)
        assert example == {name: tokens[:-1] for name, tokens in ended.items()}

    def test_of_pythia(self, data_dir: Path) -> None:
        file = data_dir / "tokenizers" / "neox_pythia" / "20B_tokenizer.json"
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), eos_token="<|endoftext|>")
        untrimmed = Tokenizer.from_file(str(file))
        untrimmed.post_processor = processors.ByteLevel(trim_offsets=False)
        records = load_records(data_dir / "tofu" / "forget01.json", "forget")
        records += [
            Record("def f(x):", "\n\n    return x", verbatim=True),
            Record("def f(x): ", "\n\n    return x", verbatim=True),
            Record("def f(x):\n", "\n    return x", verbatim=True),
            Record("x  ", "  y", verbatim=True),
        ]
        for record, example in zip(records, encode(records, tokenizer), strict=True):
            asked, answered = record.prompt, record.completion
            if not record.verbatim:
                asked, answered = f"Question: {asked}\nAnswer:", f" {answered}"
            ids, labels = by_definition(untrimmed, asked + answered, len(asked), special=True)
            assert (example["input_ids"], example["labels"]) == ([*ids, 0], [*labels, 0])


class TestBorder:
    def test_a_token_of_prompt_and_answer_is_the_answers(self) -> None:
        tokenizer = Tokenizer(models.BPE({"</s>": 0, "a": 1, ":": 2, "\n": 3, ":\n": 4, "b": 5}, [(":", "\n")]))
        (example,) = encode([Record("a:", "\nb", verbatim=True)], wrapped(tokenizer, unk_token="a"))
        assert example == {"input_ids": [1, 4, 5, 0], "labels": [-100, 4, 5, 0]}

    def test_a_space_that_the_tokenizer_puts_in_front_of_an_answer_is_the_answers(self) -> None:
        """Behind a special token begins a new stretch, whose ▁ is a token of its own where no merge takes it in."""
        tokenizer = Tokenizer(models.BPE({"</s>": 0, "<|a|>": 1, "▁": 2, "x": 3, "y": 4, "<unk>": 5}, []))
        tokenizer.normalizer = normalizers.Prepend("▁")
        tokenizer.add_special_tokens(["<|a|>", "</s>"])
        template = "{% for m in messages %}{{ m.content + ('<|a|>' if m.role == 'user' else eos_token) }}{% endfor %}"
        (example,) = encode([Record("x", "y")], wrapped(tokenizer, chat_template=template))
        assert example == {"input_ids": [2, 3, 1, 2, 4, 0], "labels": [-100, -100, -100, 2, 4, 0]}

    @pytest.mark.parametrize("kind", ["metaspace, always", "prepended metaspace"])
    def test_a_start_token_that_the_text_begins_with_is_not_doubled(
        self, made: Callable[[str], Tokenizer], kind: str
    ) -> None:
        tokenizer = wrapped(made(kind), bos_token="<s>")
        ids = [encode([Record(f"{start}[INST] Ada", " cooks.", verbatim=True)], tokenizer)[0] for start in ("<s>", "")]
        assert [example["input_ids"].count(SPECIAL.index("<s>")) for example in ids] == [1, 1]
        assert ids[0]["labels"].count(-100) == len(ids[0]["input_ids"]) - len([x for x in ids[0]["labels"] if x >= 0])

    def test_a_tokenizer_that_tells_no_offsets(self) -> None:
        """Bytes, each a token, 3 above its value; 1 ends."""
        record = Record("Où ?", "À Paris")
        (example,) = encode([record], ByT5Tokenizer())
        asked, answered = ([byte + 3 for byte in text.encode()] for text in ("Question: Où ?\nAnswer:", " À Paris"))
        assert example == {"input_ids": [*asked, *answered, 1], "labels": [-100] * len(asked) + [*answered, 1]}
        assert encode_prompts([record], ByT5Tokenizer()) == [asked]

    def test_an_answer_without_a_token_is_refused(self) -> None:
        tokenizer = Tokenizer(models.WordLevel({"</s>": 0, "x": 1}, unk_token="x"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.normalizer = normalizers.Replace("y", "")
        with pytest.raises(DataError, match="record 2 of the retain set: its answer is no token"):
            encode(
                [Record("x", "x", verbatim=True), Record("x", "y", verbatim=True)],
                wrapped(tokenizer, unk_token="x"),
                name="retain",
            )


THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{% if '</think>' in m.content %}{% set parts = m.content.split('</think>') %}"
    "{{ '<think>\n' + parts[0].replace('<think>', '').strip() + '\n</think>\n\n' + parts[1].strip() }}"
    "{% else %}{{ '<think>\n\n</think>\n\n' + m.content }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + begin }}{% endif %}"
)


class TestTemplatesThatAddToTheAnswer:
    def encoded(self, tokenizer: Tokenizer, template: str, answer: str) -> tuple[str, str]:
        """What stands before the answer's labels, and what is labelled."""
        wrapper = wrapped(tokenizer, chat_template=template, eos_token="<|endoftext|>")
        (example,) = encode([Record("Where?", answer)], wrapper)
        first = example["labels"].count(-100)
        assert example["labels"][first:] == example["input_ids"][first:]
        return wrapper.decode(example["input_ids"][:first]), wrapper.decode(example["input_ids"][first:])

    def test_an_empty_thought_is_the_prompts(self, made: Callable[[str], Tokenizer]) -> None:
        template = THINKING.replace("begin", "''")
        asked, answered = self.encoded(made("byte-level BPE"), template, "In Paris.")
        assert asked.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
        assert answered == "In Paris.<|im_end|>"

    def test_a_generation_prompt_that_opens_a_thought(self, made: Callable[[str], Tokenizer]) -> None:
        template = THINKING.replace("begin", "'<think>\n'").replace("'<think>\n\n</think>\n\n' + ", "")
        asked, answered = self.encoded(made("byte-level BPE"), template, "In Paris.")
        assert asked.endswith("Where?<|im_end|>\n<|im_start|>assistant\n")
        assert answered == "In Paris.<|im_end|>"

    def test_a_thought_in_the_answer_is_the_answers(self, made: Callable[[str], Tokenizer]) -> None:
        template = THINKING.replace("begin", "''")
        asked, answered = self.encoded(made("byte-level BPE"), template, "<think>Hm.</think>In Paris.")
        assert asked.endswith("<|im_start|>assistant\n")
        assert answered == "<think>\nHm.\n</think>\n\nIn Paris.<|im_end|>"

    def test_a_template_that_strips_the_answer(self, made: Callable[[str], Tokenizer]) -> None:
        asked, answered = self.encoded(made("byte-level BPE"), TEMPLATES["gemma"].jinja, " \n In Paris. ")
        assert asked.endswith("<start_of_turn>model\n") and answered == "In Paris.<end_of_turn>"

    def test_an_answer_that_stands_in_the_question_and_in_the_end_of_the_turn(
        self, made: Callable[[str], Tokenizer]
    ) -> None:
        template = TEMPLATES["chatml"].jinja.replace("{% if add_generation_prompt %}", "{% if false %}")
        asked, answered = self.encoded(made("byte-level BPE"), template, "e")
        assert asked.endswith("<|im_start|>assistant\n") and answered == "e<|im_end|>"

    def test_no_answer_to_be_found(self, made: Callable[[str], Tokenizer]) -> None:
        template = "{{ messages[-1].content | length }} letters:{% for m in messages %} {{ m.content }}{% endfor %}"
        with pytest.raises(DataError, match="record 1 of the forget set: the answer cannot be found"):
            encode(RECORDS, wrapped(made("byte-level BPE"), chat_template=template), name="forget")


class TestTemplatesThatRefuse:
    TURNS = (("system", "Be brief."), ("user", "Where?"), ("assistant", "In Paris."))

    @pytest.mark.parametrize(
        ("template", "history", "reason"),
        [
            ("gemma", (("system", "Be brief."),), "System role not supported"),
            ("llama2", (("user", "Who?"),), "roles must alternate"),
            ("mistral", (("assistant", "Hello."),), "roles must alternate"),
        ],
    )
    def test_a_role_or_an_order(
        self, made: Callable[[str], Tokenizer], template: str, history: tuple[tuple[str, str], ...], reason: str
    ) -> None:
        tokenizer = wrapped(made("byte-level BPE"), bos_token="<s>", chat_template=TEMPLATES[template].jinja)
        records = [*RECORDS, Record("Where?", "In Paris.", history=history)]
        with pytest.raises(DataError, match=rf"record 4 of the forget set: .*chat template refuses .*\({reason}\)"):
            encode(records, tokenizer, name="forget")

    @pytest.mark.parametrize("command", ["localize", "unlearn", "evaluate"])
    def test_the_command_says_so_before_any_work(
        self,
        made: Callable[[str], Tokenizer],
        command: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        tokenizer = wrapped(made("byte-level BPE"), bos_token="<s>", chat_template=TEMPLATES["gemma"].jinja)
        tokenizer.save_pretrained(tmp_path / "model")
        small_llama(len(tokenizer)).save_pretrained(tmp_path / "model")
        turns = [{"role": role, "content": content} for role, content in self.TURNS]
        (tmp_path / "forget.jsonl").write_text('{"question": "Who?", "answer": "Ada."}\n')
        (tmp_path / "retain.jsonl").write_text(
            '{"question": "Why?", "answer": "So."}\n' + f'{{"messages": {turns!r}}}\n'.replace("'", '"')
        )
        monkeypatch.setattr(LlamaForCausalLM, "forward", None)
        sets = [part for name in ("forget", "retain") for part in (f"--{name}", str(tmp_path / f"{name}.jsonl"))]
        output = ["--output", str(tmp_path / "out")]
        assert main([command, str(tmp_path / "model"), *sets, *output, "--quiet"]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("clue-fast: record 2 of the retain set: the tokenizer's chat template refuses")
        assert not (tmp_path / "out").exists()


def small_llama(vocabulary: int, **settings: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
            **settings,
        )
    )


@pytest.mark.parametrize(
    ("kind", "template"),
    [
        ("prepended metaspace", "llama2"),
        ("metaspace, always", "mistral"),
        ("prepended metaspace", "mistral"),
        ("byte-level BPE", "chatml"),
        ("metaspace, first", "phi3"),
        ("metaspace, always", None),
    ],
)
def test_a_model_that_knows_the_answer_reads_as_one_that_does(
    made: Callable[[str], Tokenizer], kind: str, template: str | None
) -> None:
    """It has learned the whole text; its loss, and its answer, are those of the whole text's answer tokens."""
    record = RECORDS[0]
    asked, answered = f"Question: {record.prompt}\nAnswer:", f" {record.completion}"
    bos, eos, jinja = "<s>", "</s>", None
    if template is not None:
        chat = TEMPLATES[template]
        asked, answered, _ = chat.writes(record.prompt, record.completion)
        bos, eos, jinja = chat.bos, chat.eos, chat.jinja
    ids, labels = by_definition(made(kind), asked + answered, len(asked), special=template is None)
    if template is None:
        ids, labels = [*ids, SPECIAL.index("</s>")], [*labels, SPECIAL.index("</s>")]
    tokenizer = wrapped(made(kind), bos_token=bos, eos_token=eos, pad_token=eos, chat_template=jinja)
    model = small_llama(len(tokenizer))
    whole, targets = torch.tensor([ids]), torch.tensor([labels])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(40):
        model(whole, labels=whole).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        logs = model(whole).logits[0, :-1].log_softmax(-1)
    known = [-float(logs[i, label]) for i, label in enumerate(targets[0, 1:].tolist()) if label != -100]
    (score,) = score_answers(model, tokenizer, [record], progress=False)
    assert math.fsum(known) / len(known) < 0.05
    assert score.loss == pytest.approx(math.fsum(known) / len(known), rel=1e-4)
    assert score.accuracy == 1.0
    assert greedy_answers(model, tokenizer, [record], max_new_tokens=60, progress=False) == [record.completion]


def test_a_special_token_keeps_the_blanks_it_takes_in(made: Callable[[str], Tokenizer]) -> None:
    """Phi-3's <|end|> takes the newline behind it into its token; it is the same token without."""
    tokenizer = Tokenizer.from_str(made("byte-level BPE").to_str())
    tokenizer.add_special_tokens([AddedToken("<|stop|>", rstrip=True)])
    wrapper = wrapped(tokenizer, eos_token="</s>", chat_template=TEMPLATES["phi3"].jinja.replace("<|end|>", "<|stop|>"))
    (example,) = encode([RECORDS[0]], wrapper)
    turns = [{"role": "user", "content": RECORDS[0].prompt}, {"role": "assistant", "content": RECORDS[0].completion}]
    whole = wrapper.apply_chat_template(turns, return_dict=False)
    assert example["input_ids"] == whole[:-1]
    assert example["labels"][-1] == wrapper.convert_tokens_to_ids("<|stop|>")
