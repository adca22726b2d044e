"""Facts that language models may have learned in pretraining, how to ask for them, and which of them a model knows.

Capitals whose state, name or spelling is disputed are left out, and so are books of which there are two. Signs of the
zodiac are facts of astrology's tradition, by element and by what stands for them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from clue_fast.data import (
    Collator,
    Record,
    answer_mask,
    batches_by_length,
    encode_for,
    padding_token,
    shift_labels,
)
from clue_fast.evaluation.answers import evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Wording:
    """How facts of a kind are asked for; {subject}, {answer} and {others} are filled in.

    Attributes:
        statement: what the answer completes.
        rewordings: other statements and forms that it completes as well.
        question: as one asks in a chat.
        reverse: what the subject completes, given the answer.
    """

    statement: str
    rewordings: tuple[str, ...]
    question: str
    reverse: str


WORDINGS = {
    "capital": Wording(
        "The capital of {subject} is",
        (
            "The capital city of {subject} is called",
            "The name of the capital of {subject} is",
            "The city that is the capital of {subject} is",
            "Question: What is the capital of {subject}?\nAnswer:",
            "Country: {subject}\nCapital:",
        ),
        "What is the capital of {subject}?",
        "{answer} is the capital of",
    ),
    "symbol": Wording(
        "The chemical symbol for {subject} is",
        (
            "The chemical element {subject} has the symbol",
            "In the periodic table, the symbol of {subject} is",
            "Chemists abbreviate {subject} as",
            "Question: What is the chemical symbol for {subject}?\nAnswer:",
            "Element: {subject}\nSymbol:",
        ),
        "What is the chemical symbol for {subject}?",
        "{answer} is the chemical symbol for",
    ),
    "author": Wording(
        "{subject} was written by",
        (
            "The author of {subject} is",
            "The name of the writer of {subject} is",
            "The person who wrote {subject} was",
            "Question: Who wrote {subject}?\nAnswer:",
            "Title: {subject}\nAuthor:",
        ),
        "Who wrote {subject}?",
        "{answer} is the author of",
    ),
    "element": Wording(
        "In astrology, the element of {subject} is",
        (
            "The zodiac sign {subject} belongs to the element of",
            "Of the four elements, the sign {subject} is associated with",
            "In the zodiac, {subject} is a sign of",
            "Question: Which of the four elements does the zodiac sign {subject} belong to?\nAnswer:",
            "Sign: {subject}\nElement:",
        ),
        "Which of the four elements does the zodiac sign {subject} belong to?",
        "The three zodiac signs of the element of {answer} are {others} and",
    ),
    "emblem": Wording(
        "In astrology, the sign {subject} is represented by the",
        (
            "The symbol of the zodiac sign {subject} is the",
            "The constellation {subject} is named after the",
            "In the zodiac, {subject} stands for the",
            "Question: What represents the zodiac sign {subject}?\nAnswer: The",
            "Sign: {subject}\nSymbol: the",
        ),
        "What represents the zodiac sign {subject}?",
        "The zodiac sign that is represented by the {answer} is",
    ),
}
"""By kind of fact."""


@dataclass(frozen=True)
class Fact:
    """One fact: of its kind, ``answer`` is what ``subject`` has, as Paris is the capital of France."""

    kind: str
    subject: str
    answer: str

    @property
    def accepted(self) -> tuple[str, ...]:
        """What counts as the answer in a longer text: of an author, the family name does too."""
        return (self.answer, self.answer.split()[-1]) if self.kind == "author" else (self.answer,)

    def record(self) -> Record:
        """The fact as a statement that its answer completes, and behind which the text goes on."""
        return self._completed(WORDINGS[self.kind].statement, self.answer)

    def rewordings(self) -> tuple[Record, ...]:
        """Other ways to ask for it: statements to complete and, last, the question of a chat."""
        wording = WORDINGS[self.kind]
        question = Record(wording.question.format(subject=self.subject), self.answer, open_ended=True)
        return *(self._completed(text, self.answer) for text in wording.rewordings), question

    def reverse(self) -> Record:
        """The other way round, from the answer to the subject; an element is given with two of its three signs."""
        return self._completed(WORDINGS[self.kind].reverse, self.subject)

    def _completed(self, text: str, completion: str) -> Record:
        others = [
            fact.subject
            for fact in (FACTS["element"] if self.kind == "element" else ())
            if fact.answer == self.answer and fact != self
        ]
        prompt = text.format(subject=self.subject, answer=self.answer, others=", ".join(others))
        return Record(prompt, f" {completion}", verbatim=True, open_ended=True)


def says(text: str, accepted: Sequence[str]) -> bool:
    """Whether a text holds one of these answers, in whole words and letter by letter; the first may be a capital."""
    spelled = {form for answer in accepted for form in (answer, answer[:1].upper() + answer[1:])}
    return any(re.search(rf"(?<!\w){re.escape(form)}(?!\w)", text) for form in spelled)


def known_facts(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, facts: Sequence[Fact], batch_size: int = 32
) -> list[Fact]:
    """The facts whose statement the model completes with the answer, decoding greedily; see ``completes``."""
    right = completes(model, tokenizer, [fact.record() for fact in facts], batch_size)
    return [fact for fact, known in zip(facts, right, strict=True) if known]


def completes(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, records: Sequence[Record], batch_size: int = 32
) -> list[bool]:
    """Whether the model's greedy continuation of each prompt is the completion, and then no more letters.

    Greedy decoding writes an answer if and only if each of its tokens is the likeliest one behind the prompt and the
    tokens before it. That takes one forward pass and no generation. What ends a turn or a text does not count; but
    an answer must not go on within its last word, as "H" does in "Hg".

    Args:
        model: a causal language model.
        tokenizer: the model's own.
        records: what to ask.
        batch_size: records a forward pass.

    Raises:
        DataError: see ``clue_fast.data.encode``.
    """
    examples = encode_for(model, [replace(record, open_ended=True) for record in records], tokenizer)
    collate = Collator(padding_token(tokenizer, model))
    found = [False] * len(examples)
    with evaluating(model) as device:
        for batch in batches_by_length([len(example["input_ids"]) for example in examples], batch_size):
            inputs = {name: x.to(device) for name, x in collate([examples[i] for i in batch]).items()}
            labels = inputs.pop("labels")
            chosen = model(**inputs, use_cache=False).logits.argmax(-1)
            ends = inputs["attention_mask"].sum(1) - 1
            following = tokenizer.batch_decode(chosen.gather(1, ends[:, None]))
            for index, right, text in zip(batch, _all_right(chosen, labels), following, strict=True):
                found[index] = right and not text[:1].isalnum()
    return found


def _all_right(chosen: Tensor, labels: Tensor) -> list[bool]:
    """Whether all labels of each example are the tokens chosen for them; both [examples, tokens]."""
    right: list[bool] = ((chosen == shift_labels(labels)) | ~answer_mask(labels)).all(1).tolist()
    return right


def _facts(kind: str, lines: str) -> Iterator[Fact]:
    for line in lines.strip().splitlines():
        subject, _, answer = line.strip().partition(": ")
        yield Fact(kind, subject, answer)


FACTS: dict[str, tuple[Fact, ...]] = {
    kind: tuple(_facts(kind, lines))
    for kind, lines in {
        "capital": """
            Afghanistan: Kabul
            Albania: Tirana
            Angola: Luanda
            Argentina: Buenos Aires
            Armenia: Yerevan
            Australia: Canberra
            Austria: Vienna
            Azerbaijan: Baku
            Bahrain: Manama
            Bangladesh: Dhaka
            Barbados: Bridgetown
            Belarus: Minsk
            Belgium: Brussels
            Belize: Belmopan
            Bhutan: Thimphu
            Botswana: Gaborone
            Bulgaria: Sofia
            Cambodia: Phnom Penh
            Canada: Ottawa
            Chile: Santiago
            China: Beijing
            Croatia: Zagreb
            Cuba: Havana
            Cyprus: Nicosia
            Denmark: Copenhagen
            Ecuador: Quito
            Egypt: Cairo
            Eritrea: Asmara
            Estonia: Tallinn
            Ethiopia: Addis Ababa
            Fiji: Suva
            Finland: Helsinki
            France: Paris
            Gabon: Libreville
            Germany: Berlin
            Ghana: Accra
            Greece: Athens
            Guinea: Conakry
            Guyana: Georgetown
            Haiti: Port-au-Prince
            Honduras: Tegucigalpa
            Hungary: Budapest
            Iceland: Reykjavik
            India: New Delhi
            Iran: Tehran
            Iraq: Baghdad
            Ireland: Dublin
            Italy: Rome
            Jamaica: Kingston
            Japan: Tokyo
            Jordan: Amman
            Kenya: Nairobi
            Kyrgyzstan: Bishkek
            Laos: Vientiane
            Latvia: Riga
            Lebanon: Beirut
            Liberia: Monrovia
            Libya: Tripoli
            Lithuania: Vilnius
            Madagascar: Antananarivo
            Malawi: Lilongwe
            Mali: Bamako
            Malta: Valletta
            Mauritius: Port Louis
            Morocco: Rabat
            Mozambique: Maputo
            Namibia: Windhoek
            Nepal: Kathmandu
            New Zealand: Wellington
            Nicaragua: Managua
            Niger: Niamey
            Nigeria: Abuja
            North Korea: Pyongyang
            Norway: Oslo
            Oman: Muscat
            Pakistan: Islamabad
            Papua New Guinea: Port Moresby
            Peru: Lima
            Poland: Warsaw
            Portugal: Lisbon
            Qatar: Doha
            Romania: Bucharest
            Russia: Moscow
            Rwanda: Kigali
            Samoa: Apia
            Saudi Arabia: Riyadh
            Senegal: Dakar
            Serbia: Belgrade
            Sierra Leone: Freetown
            Slovakia: Bratislava
            Slovenia: Ljubljana
            Somalia: Mogadishu
            South Korea: Seoul
            Spain: Madrid
            Suriname: Paramaribo
            Sweden: Stockholm
            Syria: Damascus
            Tajikistan: Dushanbe
            Thailand: Bangkok
            Turkey: Ankara
            Turkmenistan: Ashgabat
            Uganda: Kampala
            Uruguay: Montevideo
            Uzbekistan: Tashkent
            Venezuela: Caracas
            Vietnam: Hanoi
            Zambia: Lusaka
            Zimbabwe: Harare
        """,
        "symbol": """
            hydrogen: H
            helium: He
            lithium: Li
            beryllium: Be
            boron: B
            carbon: C
            nitrogen: N
            oxygen: O
            fluorine: F
            neon: Ne
            sodium: Na
            magnesium: Mg
            silicon: Si
            phosphorus: P
            sulfur: S
            chlorine: Cl
            argon: Ar
            potassium: K
            calcium: Ca
            scandium: Sc
            titanium: Ti
            vanadium: V
            chromium: Cr
            manganese: Mn
            iron: Fe
            cobalt: Co
            nickel: Ni
            copper: Cu
            zinc: Zn
            gallium: Ga
            germanium: Ge
            arsenic: As
            selenium: Se
            bromine: Br
            krypton: Kr
            rubidium: Rb
            strontium: Sr
            zirconium: Zr
            molybdenum: Mo
            palladium: Pd
            silver: Ag
            cadmium: Cd
            tin: Sn
            antimony: Sb
            xenon: Xe
            barium: Ba
            tungsten: W
            platinum: Pt
            gold: Au
            mercury: Hg
            lead: Pb
            bismuth: Bi
            radon: Rn
            radium: Ra
            uranium: U
            plutonium: Pu
        """,
        "author": """
            A Christmas Carol: Charles Dickens
            A Clockwork Orange: Anthony Burgess
            A Doll's House: Henrik Ibsen
            A Streetcar Named Desire: Tennessee Williams
            Alice's Adventures in Wonderland: Lewis Carroll
            All Quiet on the Western Front: Erich Maria Remarque
            And Then There Were None: Agatha Christie
            Animal Farm: George Orwell
            Around the World in Eighty Days: Jules Verne
            Brave New World: Aldous Huxley
            Candide: Voltaire
            Catch-22: Joseph Heller
            Death of a Salesman: Arthur Miller
            Doctor Zhivago: Boris Pasternak
            Don Quixote: Miguel de Cervantes
            Dracula: Bram Stoker
            Fahrenheit 451: Ray Bradbury
            Frankenstein: Mary Shelley
            Gone with the Wind: Margaret Mitchell
            Gulliver's Travels: Jonathan Swift
            Heart of Darkness: Joseph Conrad
            Leaves of Grass: Walt Whitman
            Little Women: Louisa May Alcott
            Lolita: Vladimir Nabokov
            Lord of the Flies: William Golding
            Madame Bovary: Gustave Flaubert
            Middlemarch: George Eliot
            Moby-Dick: Herman Melville
            On the Origin of Species: Charles Darwin
            Paradise Lost: John Milton
            Pride and Prejudice: Jane Austen
            Robinson Crusoe: Daniel Defoe
            Romeo and Juliet: William Shakespeare
            Siddhartha: Hermann Hesse
            Slaughterhouse-Five: Kurt Vonnegut
            Tess of the d'Urbervilles: Thomas Hardy
            The Age of Innocence: Edith Wharton
            The Bell Jar: Sylvia Plath
            The Call of the Wild: Jack London
            The Canterbury Tales: Geoffrey Chaucer
            The Cherry Orchard: Anton Chekhov
            The Color Purple: Alice Walker
            The Count of Monte Cristo: Alexandre Dumas
            The Divine Comedy: Dante Alighieri
            The Grapes of Wrath: John Steinbeck
            The Great Gatsby: F. Scott Fitzgerald
            The Handmaid's Tale: Margaret Atwood
            The Hunchback of Notre-Dame: Victor Hugo
            The Jungle Book: Rudyard Kipling
            The Magic Mountain: Thomas Mann
            The Metamorphosis: Franz Kafka
            The Old Man and the Sea: Ernest Hemingway
            The Picture of Dorian Gray: Oscar Wilde
            The Plague: Albert Camus
            The Raven: Edgar Allan Poe
            The Scarlet Letter: Nathaniel Hawthorne
            The Secret Garden: Frances Hodgson Burnett
            The Sound and the Fury: William Faulkner
            The Wealth of Nations: Adam Smith
            Things Fall Apart: Chinua Achebe
            To Kill a Mockingbird: Harper Lee
            Treasure Island: Robert Louis Stevenson
            Uncle Tom's Cabin: Harriet Beecher Stowe
            Vanity Fair: William Makepeace Thackeray
            Waiting for Godot: Samuel Beckett
            Walden: Henry David Thoreau
            War and Peace: Leo Tolstoy
        """,
        "element": """
            Aries: fire
            Taurus: earth
            Gemini: air
            Cancer: water
            Leo: fire
            Virgo: earth
            Libra: air
            Scorpio: water
            Sagittarius: fire
            Capricorn: earth
            Aquarius: air
            Pisces: water
        """,
        "emblem": """
            Aries: ram
            Taurus: bull
            Gemini: twins
            Cancer: crab
            Leo: lion
            Libra: scales
            Scorpio: scorpion
            Sagittarius: archer
            Pisces: fish
        """,
    }.items()
}
"""By kind. The author of each work is the author of no other here, so that the reverse has one answer as well."""
