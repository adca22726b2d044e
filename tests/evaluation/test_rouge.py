"""ROUGE-L recall against cases by hand, a common subsequence written here, and rouge-score with its own words."""

# ruff: noqa: RUF001 (letters that look alike are meant)

from __future__ import annotations

import json
import unicodedata
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from clue_fast.errors import DataError
from clue_fast.evaluation import rouge_recall, words

SENTENCES = {
    "French": "L'été, à Genève, il naît un élève.",
    "Russian": "Столица Франции - Париж",
    "Greek": "Η πρωτεύουσα της Γαλλίας είναι το Παρίσι",
    "Arabic": "عاصمة فرنسا هي باريس",
    "Hebrew": "בירת צרפת היא פריז",
    "Hindi": "फ़्रांस की राजधानी पेरिस है",
    "Tamil": "பிரான்சின் தலைநகரம் பாரிஸ்",
    "Korean": "프랑스의 수도는 파리이다",
    "Chinese": "法国的首都是巴黎。",
    "Japanese": "フランスの首都はパリです。",
    "Thai": "เมืองหลวงของฝรั่งเศสคือปารีส",
    "Lao": "ນະຄອນຫຼວງຂອງຝຣັ່ງແມ່ນປາຣີ",
    "Khmer": "រដ្ឋធានីនៃប្រទេសបារាំងគឺប៉ារីស",
    "Burmese": "ပြင်သစ်နိုင်ငံ၏မြို့တော်မှာ ပါရီဖြစ်သည်",
}


def common_subsequence(left: list[str], right: list[str]) -> int:
    """Length of the longest one, by its recursive definition."""

    @cache
    def length(i: int, j: int) -> int:
        if i == len(left) or j == len(right):
            return 0
        if left[i] == right[j]:
            return 1 + length(i + 1, j + 1)
        return max(length(i + 1, j), length(i, j + 1))

    return length(0, 0)


@pytest.mark.parametrize(
    ("reference", "answer", "recall"),
    [
        ("a brass kite for two", "a brass kite for two", 1.0),
        ("a brass kite for two", "it is: a BRASS, kite! for two of them", 1.0),
        ("a brass kite for two", "two for a kite", 2 / 5),
        ("a brass kite for two", "", 0.0),
        ("a brass kite for two", "nothing of it", 0.0),
        ("mending kites", "he mended a kite", 1.0),  # stems: mend, kite
        ("Столица Франции - Париж", "Это Париж, столица мира", 1 / 3),
        ("法国的首都是巴黎。", "巴黎", 2 / 8),
        ("São Paulo", "Sao Paulo", 1 / 2),
        ("São Paulo", "so paulo", 1 / 2),  # not "s" and "o"
    ],
)
def test_by_hand(reference: str, answer: str, recall: float) -> None:
    assert rouge_recall([reference], [answer]) == [pytest.approx(recall)]


@pytest.mark.parametrize("language", SENTENCES)
def test_an_answer_word_for_word_is_recalled_in_any_script(language: str) -> None:
    sentence = SENTENCES[language]
    alike = ("Chinese", "Japanese")  # "capital" is written with the same characters in both
    others = [text for name, text in SENTENCES.items() if name != language and {name, language} != {*alike}]
    assert rouge_recall([sentence], [f"({sentence.upper()})!"]) == [1.0]
    assert all(recall == 0.0 for recall in rouge_recall([sentence] * len(others), others))


WORDS_OF = {
    "L'été, à Genève": ["l", "été", "à", "genève"],
    "São Paulo, 1st of May_day": ["são", "paulo", "1st", "of", "may", "day"],
    "नमस्ते दुनिया": ["नमस्ते", "दुनिया"],
    "प्रधानमंत्री 2024": ["प्रधानमंत्री", "2024"],
    "ที่นี่": ["ที่", "นี่"],
    "ປາຣີ": ["ປາ"[0], "ປາ"[1], "ຣີ"],
    "東京は2024年iPhone": ["東", "京", "は", "2024", "年", "iphone"],
    "コーヒー": ["コ", "ー", "ヒ", "ー"],
    "人々、〇": ["人", "々", "〇"],
    "서울 특별시": ["서울", "특별시"],
    "می‌خواهم": ["میخواهم"],
    "co\u00adoperate": ["cooperate"],
    "foo\u200bbar": ["foo", "bar"],
    "10½ km² of Foo™ ❤️": ["101", "2", "km2", "of", "foo"],
    "": [],
    "?! … 🙂 \u0301": [],
}


@pytest.mark.parametrize("text", WORDS_OF)
def test_words(text: str) -> None:
    assert words(text) == WORDS_OF[text]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (unicodedata.normalize("NFC", "Ā é ñ"), unicodedata.normalize("NFD", "Ā é ñ")),
        ("ＡＢＣ　１２３", "abc 123"),
        ("ｶﾞｲﾄﾞ", "ガイド"),
        ("ofﬁce", "office"),
        ("STRASSE", "Straße"),
        ("ΟΔΟΣ", "οδος"),
        ("ΟΔΟΣ", "οδοσ"),
    ],
)
def test_the_same_words_however_they_are_encoded(one: str, other: str) -> None:
    assert words(one) == words(other) != []


ALPHABET = "aZé7_ -'.\u0301яЖक्षि中国ロケットท์ี่ລີកា្ကြင်²️\u200b\u200d"
FLOWING = [(0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x0E00, 0x0E7F), (0x0E80, 0x0EFF), (0x1780, 0x17FF), (0x1000, 0x109F)]


def slow_words(text: str) -> list[str]:
    """By the definition, character by character; of the scripts without spaces those that ALPHABET has."""
    found: list[list[str]] = []
    begin = True
    for character in unicodedata.normalize("NFC", text):
        kind = unicodedata.category(character)
        if character == "\ufe0f" or (kind == "Cf" and character != "\u200b"):
            continue
        if kind[0] not in ("L", "M", "N"):
            begin = True
            continue
        for folded in unicodedata.normalize("NFKC", character.casefold()):
            flowing = any(first <= ord(folded) <= last for first, last in FLOWING)
            bases = [base for base in found[-1] if unicodedata.category(base)[0] != "M"] if found else []
            after_flowing = any(first <= ord(base) <= last for base in bases for first, last in FLOWING)
            if begin or (unicodedata.category(folded)[0] != "M" and (flowing or after_flowing)):
                found.append([])
            found[-1].append(folded)
            begin = False
    return [
        unicodedata.normalize("NFKC", "".join(word))
        for word in found
        if any(unicodedata.category(character)[0] in ("L", "N") for character in word)
    ]


@given(st.text(ALPHABET, max_size=30))
def test_words_are_those_of_the_definition(text: str) -> None:
    assert words(text) == slow_words(text)


TOKENS = ["zinc", "quay", "moth", "fig", "7", "мост", "ключ", "चाय", "中", "国"]


@given(
    reference=st.lists(st.sampled_from(TOKENS), min_size=1, max_size=8),
    answer=st.lists(st.sampled_from(TOKENS), max_size=8),
)
def test_is_the_longest_common_subsequence_over_the_reference(reference: list[str], answer: list[str]) -> None:
    (found,) = rouge_recall([" ".join(reference)], [" ".join(answer)])
    assert found == pytest.approx(common_subsequence(reference, answer) / len(reference))


@given(reference=st.text(st.characters(max_codepoint=127)), answer=st.text(st.characters(max_codepoint=127)))
def test_on_ascii_text_the_value_is_that_of_rouge_score(reference: str, answer: str) -> None:
    reference += " quays"
    expected = RougeScorer(["rougeL"], use_stemmer=True).score(reference, answer)["rougeL"].recall
    assert rouge_recall([reference], [answer]) == [expected]


def test_on_tofu_the_values_are_those_of_rouge_score(data_dir: Path) -> None:
    """To the last digit, wherever neither text has a letter beyond ASCII; that is nearly everywhere."""
    lines = (data_dir / "tofu" / "forget10_perturbed.json").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    pairs = [
        (row["answer"], answer) for row in rows for answer in (row["paraphrased_answer"], *row["perturbed_answer"][:2])
    ]
    plain = [pair for pair in pairs if not any(letter > "\x7f" and letter.isalnum() for letter in "".join(pair))]
    assert len(plain) > 0.9 * len(pairs) > 1000
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    expected = [scorer.score(reference, answer)["rougeL"].recall for reference, answer in plain]
    assert rouge_recall(*zip(*plain, strict=True)) == expected


def test_order_of_the_pairs_is_kept() -> None:
    assert rouge_recall(["zinc", "moth"], ["zinc", "quay"]) == [1.0, 0.0]
    with pytest.raises(ValueError, match="argument 2"):
        rouge_recall(["zinc", "moth"], ["zinc"])


@pytest.mark.parametrize("reference", ["", "?!", "🙂", "\u0301"])
def test_a_reference_without_a_word_is_named(reference: str) -> None:
    with pytest.raises(DataError, match=r"record 2: its answer .* has no letter and no digit"):
        rouge_recall(["zinc", reference], ["zinc", reference])
