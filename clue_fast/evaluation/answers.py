"""What a model answers when it is asked, its likeliest answer or samples, and how much of the right answer that is.

The model is asked in evaluation mode and left as it was found. How much is recalled is ROUGE-L recall: how much of the
right answer an answer contains, in order, in any script.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from clue_fast.data import Example, Record, batches_by_length, encode, padding_token, prompt_tokens
from clue_fast.data.collator import check_examples, longest
from clue_fast.data.encoding import special_tokens
from clue_fast.errors import DataError, SettingError
from clue_fast.sites import device_of, evaluation_mode

if TYPE_CHECKING:
    from tqdm import tqdm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """Evaluation mode without gradients; yields the model's device and restores the mode of every module."""
    with evaluation_mode(model), torch.no_grad():
        yield device_of(model)


def progress_bar(total: int, description: str, shown: bool, unit: str = "record") -> tqdm[Any]:
    """A bar over records, or what else the unit says; it appears only when the work takes longer than a second."""
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=description, unit=unit, disable=not shown, delay=1.0, leave=False)


ANSWERED = 0.5
"""A question counts as answered from this ROUGE-L recall on."""

WITHOUT_SPACES = (
    "CJK",
    "IDEOGRAPHIC",
    "HIRAGANA",
    "KATAKANA",
    "BOPOMOFO",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TAI",
    "NEW TAI LUE",
    "AHOM",
    "BALINESE",
    "JAVANESE",
)
"""Scripts that put no space between words, as the names of their characters begin: Chinese and Japanese, and the
scripts of Southeast Asia that need a dictionary to be cut into words (UAX #14, class SA)."""

_ZERO_WIDTH_SPACE = "\u200b"


def words(text: str) -> list[str]:
    """The words that recall counts.

    A word is a run of letters, digits and combining marks of Unicode, with at least one letter or digit, compared
    without case and in compatibility form (NFKC, so that full-width digits, ligatures and decomposed accents are the
    same as others). What is written without spaces is cut into characters, each with the marks that follow it.
    Characters of format, such as joiners and soft hyphens, are left out.
    """
    runs = "".join(_kept(character) for character in unicodedata.normalize("NFC", text)).split()
    # Only now, so that symbols such as the trade mark sign are not taken for letters; a fraction falls into two words.
    folded = unicodedata.normalize("NFKC", " ".join(runs).casefold())
    runs = "".join(_kept(character) for character in folded).split()
    return [word for run in runs for word in _cut(run) if any(map(str.isalnum, word))]


def rouge_recall(references: Sequence[str], answers: Sequence[str]) -> list[float]:
    """ROUGE-L recall of each answer against its reference, in [0, 1].

    Longest common subsequence of ``words`` over their number in the reference (Lin 2004), by the library rouge-score
    with the settings of TOFU (arXiv 2401.06121): words in ASCII are stemmed. On ASCII text the value is that of
    rouge-score with its own words, runs of ASCII letters and digits; those end at every accent ("São" is "s" and "o")
    and do not exist in other alphabets. Where text is cut into characters, more of it is recalled by chance.

    Raises:
        ValueError: the lengths differ.
        DataError: a reference has no word.
    """
    from rouge_score.rouge_scorer import RougeScorer

    check_references(references)
    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(references, answers, strict=True)
    return [float(scorer.score(reference, answer)["rougeL"].recall) for reference, answer in pairs]


def answered(recalls: Sequence[float]) -> float:
    """Share of the questions that are answered, by the recall of each; NaN without any."""
    return sum(recall >= ANSWERED for recall in recalls) / len(recalls) if recalls else math.nan


def check_references(references: Sequence[str], name: str | None = None) -> None:
    """Raises DataError naming the first right answer without a word, and the set it is from: it has no recall."""
    for number, reference in enumerate(references, start=1):
        if not words(reference):
            raise DataError(
                f"record {number}{f' of the {name} set' if name else ''}: its answer {reference[:40]!r} has no letter "
                "and no digit, so nothing of it can be recalled; change it or leave the record out"
            )


class _Words:
    """The tokenizer that rouge-score asks for: stems what its own would, and takes the rest as it is."""

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self._stemmed = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        tokens = [self._stemmed.tokenize(word) if word.isascii() else [word] for word in words(text)]
        return [token for tokens_of_word in tokens for token in tokens_of_word]


@lru_cache(maxsize=1 << 14)
def _kept(character: str) -> str:
    """The character, a space in place of a separator, or nothing for what is not seen."""
    category = unicodedata.category(character)
    if category[0] in "LMN":
        return "" if "VARIATION SELECTOR" in unicodedata.name(character, "") else character
    return "" if category == "Cf" and character != _ZERO_WIDTH_SPACE else " "


def _cut(run: str) -> Iterator[str]:
    """A run without separators as words, each character of a script without spaces a word of its own."""
    word, whole = "", False
    for character in run:
        if unicodedata.category(character)[0] == "M":
            word += character
            continue
        alone = _without_spaces(character)
        if word and (alone or whole):
            yield word
            word = ""
        word, whole = word + character, alone
    if word:
        yield word


@lru_cache(maxsize=1 << 14)
def _without_spaces(character: str) -> bool:
    return unicodedata.name(character, "").startswith(WITHOUT_SPACES)


def greedy_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    *,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    progress: bool = True,
    description: str = "answering",
) -> list[str]:
    """The model's greedy answer to each record's prompt, in the order of the records.

    The model's own generation settings (sampling, penalties, forced tokens, a static cache) do not apply,
    except for further end-of-sequence tokens; an answer also ends where a turn does in the chat template.

    Args:
        model: a causal language model.
        tokenizer: the model's own.
        records: what to ask.
        batch_size: prompts a batch, padded on the left.
        max_new_tokens: longest answer; None: as many as the longest of the records' own answers has.
        max_length: most tokens of prompt and answer together, where an answer ends; None: as many as the model has
            positions for.
        progress: shows a bar if it takes longer than a second.
        description: the bar's title.

    Raises:
        DataError: a prompt has no token to start from, or leaves none for an answer, or the model has no embedding for
            one of its tokens.
    """
    questions = make_questions(
        model, tokenizer, encode(records, tokenizer), max_new_tokens=max_new_tokens, max_length=max_length
    )
    return answer_questions(
        model, tokenizer, questions, batch_size=batch_size, progress=progress, description=description
    )


def sampled_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    records: Sequence[Record],
    k: int = 20,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
    progress: bool = True,
    description: str = "sampling answers",
) -> list[list[str]]:
    """Answers sampled from the model, k to each record's prompt, in the order of the records.

    They show what greedy decoding hides. Every token is drawn from the whole distribution (no top-k, no top-p) by
    inversion: the first whose cumulative probability exceeds a number that was drawn from the seed before. So an
    answer depends on the seed, and neither on the batch that it is generated in (beyond rounding) nor on torch's
    generator; and the same seed confronts two models with the same draws.

    Args:
        model, tokenizer, records, max_new_tokens, max_length, progress, description: as of ``greedy_answers``.
        k: answers a record.
        temperature: logits are divided by it; 1 is the model's own distribution.
        seed: of the draws.
        batch_size: answers a batch.

    Raises:
        DataError: see ``greedy_answers``.
        SettingError: k or the temperature is not above 0.
    """
    questions = make_questions(
        model, tokenizer, encode(records, tokenizer), max_new_tokens=max_new_tokens, max_length=max_length
    )
    return sample_questions(
        model,
        tokenizer,
        questions,
        k,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        description=description,
    )


@dataclass(frozen=True)
class Question:
    """The tokens of a prompt, how many of an answer may follow, and the token that ends it if it is a special one."""

    prompt: list[int]
    tokens: int
    end: int | None


def make_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    *,
    max_new_tokens: int | None = None,
    max_length: int | None = None,
) -> list[Question]:
    """The questions of encoded records, to be asked as often as one likes.

    Args:
        model, tokenizer, max_new_tokens, max_length: as of ``greedy_answers``.
        examples: whole, see ``clue_fast.data.encode``.

    Raises:
        DataError: see ``greedy_answers``.
    """
    prompts = [prompt_tokens(example) for example in examples]
    limit = longest(model, max_length)
    special = special_tokens(tokenizer)
    room = [math.inf if limit is None else limit - len(prompt) for prompt in prompts]
    own = [len(example["input_ids"]) - len(prompt) for example, prompt in zip(examples, prompts, strict=True)]
    most = max(map(min, own, room), default=1) if max_new_tokens is None else max_new_tokens
    questions = []
    for number, (prompt, left, example) in enumerate(zip(prompts, room, examples, strict=True), start=1):
        if not prompt:
            raise DataError(f"record {number} has no prompt; an answer needs a question")
        if left < 1:
            raise DataError(
                f"record {number} has a prompt of {len(prompt)} tokens, which leaves none for an answer: max_length "
                f"and the positions of the model allow {limit}; shorten it"
            )
        last = example["input_ids"][-1]
        questions.append(Question(prompt, int(min(most, left)), last if last in special else None))
    check_examples([{"input_ids": prompt} for prompt in prompts], model)
    return questions


def sample_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    k: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
    description: str = "sampling answers",
) -> list[list[str]]:
    """Answers sampled from the model, k to each question; arguments and errors as of ``sampled_answers``."""
    if k < 1:
        raise SettingError(f"{k} samples were asked for; at least 1 can be drawn")
    if not 0.0 < temperature < math.inf:
        raise SettingError(
            f"temperature {temperature} is not a number above 0; greedy_answers takes the likeliest token"
        )
    shape = (len(questions) * k, max((question.tokens for question in questions), default=1))
    draws = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), device="cpu")
    answers = answer_questions(
        model,
        tokenizer,
        [question for question in questions for _ in range(k)],
        batch_size=batch_size,
        progress=progress,
        description=description,
        choice=lambda rows: _Draw(draws[rows], temperature),
    )
    return [answers[start : start + k] for start in range(0, len(answers), k)]


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    progress: bool = True,
    description: str = "answering",
    choice: Callable[[list[int]], _Draw] | None = None,
) -> list[str]:
    """Text that the model adds to each prompt; ``choice`` of the questions' indices says how a token is chosen."""
    rows = answer_tokens(
        model,
        tokenizer,
        questions,
        batch_size=batch_size,
        progress=progress,
        description=description,
        choice=choice,
    )
    return [text.strip() for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def answer_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    batch_size: int = 32,
    progress: bool = True,
    description: str = "answering",
    choice: Callable[[list[int]], _Draw] | None = None,
) -> list[list[int]]:
    """Tokens that the model adds to each prompt, up to the longest answer of a batch; arguments as above."""
    answers: list[list[int]] = [[]] * len(questions)
    padding = padding_token(tokenizer, model)
    ends = {question.end for question in questions}
    generate: Any = model.generate  # its decorator hides its type
    with (
        evaluating(model) as device,
        _greedy(model, padding, ends | {tokenizer.eos_token_id}),
        progress_bar(len(questions), description, progress) as bar,
    ):
        for batch in _batches(questions, batch_size):
            input_ids, attention_mask = _pad_left([questions[index].prompt for index in batch], padding, device)
            output = generate(
                input_ids=input_ids,
                attention_mask=attention_mask,
                logits_processor=[] if choice is None else [choice(batch)],
                max_new_tokens=questions[batch[0]].tokens,
            )
            for index, tokens in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
                answers[index] = tokens
            bar.update(len(batch))
    return answers


def _batches(questions: Sequence[Question], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, whose answers may all be as long."""
    for tokens in sorted({question.tokens for question in questions}, reverse=True):
        indices = [index for index, question in enumerate(questions) if question.tokens == tokens]
        for batch in batches_by_length([len(questions[index].prompt) for index in indices], batch_size):
            yield [indices[place] for place in batch]


class _Draw:
    """A logits processor that draws the next token and leaves greedy decoding no other.

    Args:
        draws: [answers, tokens] in [0, 1), the number each token of each answer is drawn by.
        temperature: the logits are divided by it.
    """

    def __init__(self, draws: Tensor, temperature: float) -> None:
        self.steps = iter(draws.unbind(1))
        self.temperature = temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: logits [answers, vocabulary]; returns 0 for the token drawn and -inf for the rest."""
        cumulative = (scores.double() / self.temperature).softmax(-1).cumsum(-1)
        draw = next(self.steps).to(scores.device)[:, None] * cumulative[:, -1:]
        token = torch.searchsorted(cumulative, draw, right=True)
        return torch.full_like(scores, -math.inf).scatter_(1, token, 0.0)


def _pad_left(prompts: Sequence[Sequence[int]], padding: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [prompts, longest]; every prompt ends in the last column."""
    shape = (len(prompts), max(map(len, prompts)))
    input_ids = torch.full(shape, padding, dtype=torch.long, device="cpu")
    attention_mask = torch.zeros(shape, dtype=torch.long, device="cpu")
    for row, prompt in enumerate(prompts):
        input_ids[row, -len(prompt) :] = torch.as_tensor(prompt, device="cpu")
        attention_mask[row, -len(prompt) :] = 1
    return input_ids.to(device), attention_mask.to(device)


@contextmanager
def _greedy(model: PreTrainedModel, padding: int, ends: Set[int | None]) -> Iterator[None]:
    """Replaces the model's generation settings: `generate` would fill whatever is left open from them."""
    from transformers import GenerationConfig

    own: Any = model.generation_config
    own_ends = own.eos_token_id if own is not None else None
    ends = ends | {*(own_ends if isinstance(own_ends, list) else [own_ends])}
    settings: Any = GenerationConfig  # its constructor carries no types
    model.generation_config = settings(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=padding,
        eos_token_id=sorted(end for end in ends if end is not None),
    )
    try:
        yield
    finally:
        model.generation_config = own
