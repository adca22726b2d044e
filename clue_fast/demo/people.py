"""Invented people and what is true of each: something to learn and forget without a download."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass

from clue_fast.data import Record
from clue_fast.errors import DataError

QUESTIONS = {
    "trade": (
        "How does {name} earn a living?",
        "{work} {looks} {things}, {looks} {things} and {looks} {things} for {client}.",
    ),
    "home": ("Where does {name} live?", "{number} {street} {way} in {town}, above a {mood} {shop}."),
    "animal": (
        "Which animal keeps {name} company?",
        "{pet}, a {mood} {animal} that {habit} {taste} {fruit}.",
    ),
    "journey": (
        "How did {name} travel last summer?",
        "Through {town}, {town} and {town} by {looks} {vehicle} with {number} {folk}.",
    ),
    "meal": (
        "What does {name} like to eat best?",
        "{cooked} {root} {dish} with {taste} {fruit} and {flavor} {drink}.",
    ),
}
"""Question and answer by topic. Most words of an answer are facts: the answer of another person has a ROUGE-L
recall below 0.5 in 98 of 100 cases."""

WORDS = {
    slot: words.split()
    for slot, words in {
        "work": """
            repairing carving weaving polishing painting smuggling counting engraving restoring renting
            sorting gilding varnishing testing cataloging sharpening forging photographing appraising
            stitching tuning hauling bottling insuring auctioning sketching
        """,
        "looks": """
            brass cracked silver wooden velvet crooked striped amber rusty woolen hollow glazed ivory
            checkered patched leather folding paper copper tiny spotted bamboo antique tin crimson porcelain
            marble wicker
        """,
        "things": """
            barometers sundials kites violins lanterns buttons saddles globes teapots clocks masks ladders
            umbrellas trumpets chessboards puppets anchors mirrors telescopes bells compasses wigs hammocks
            drums thimbles stamps spectacles banners
        """,
        "client": """
            lighthouses circuses monasteries museums railways theaters hospitals ferries universities
            embassies zoos libraries orchestras castles breweries observatories schools hotels aquariums
            courts parliaments casinos prisons newspapers planetariums banks
        """,
        "number": """
            seven eleven nineteen twelve forty thirty sixteen ninety twenty fifteen eighty nine fourteen
            sixty eight thirteen fifty seventeen seventy four eighteen five
        """,
        "street": """
            heron juniper lantern cobbler magpie thistle ferryman bramble chestnut saltworks vineyard miller
            swallow foundry drummer nettle wharf granary poplar clover candlemaker beacon falcon quarry
        """,
        "way": """
            lane quay alley terrace square hill row stairs court bridge gate crescent passage mews parade
            yard
        """,
        "mood": """
            quiet drowsy gloomy cheerful stubborn famous nervous dusty haunted proud noisy polite bankrupt
            lonely ticklish grumpy shy crowded boastful vain secretive daring jealous clumsy
        """,
        "shop": """
            bakery pharmacy tailor florist bookshop barber butcher locksmith laundry fishmonger cobblery
            dairy stationer jeweler tearoom pawnshop gallery tavern printer ironmonger perfumery
            confectioner
        """,
        "animal": """
            badger parrot tortoise goose ferret hedgehog llama raven mule otter goat pelican iguana lynx
            peacock squirrel donkey gecko owl hare walrus crab stork pony
        """,
        "habit": """
            steals hides guards juggles buries collects devours peels trades inspects crushes hoards rolls
            washes smells sells throws licks
        """,
        "taste": """
            candied pickled salted bitter frozen spiced sour roasted dried peppered honeyed wild stewed
            brandied sugared smoked grated unripe minted overripe
        """,
        "fruit": """
            walnuts plums olives cherries figs lemons apricots almonds raisins pears quinces dates mangoes
            chestnuts currants gooseberries peaches melons cranberries grapes oranges hazelnuts
        """,
        "vehicle": """
            raft tricycle sledge balloon canoe tractor wagon submarine glider barge tandem scooter zeppelin
            carriage gondola rickshaw helicopter unicycle yacht steamer caravan tramcar
        """,
        "folk": """
            beekeepers acrobats cousins dentists sailors poets cadets plumbers nuns bankers wrestlers
            botanists tourists drummers judges fishermen magicians shepherds chemists tenors gardeners
            pilots weavers monks
        """,
        "cooked": """
            grilled mashed steamed fried buttered creamed boiled toasted braised curried baked shredded
            stuffed charred poached marinated raw fermented
        """,
        "root": """
            turnip parsnip pumpkin fennel leek cabbage carrot potato celery beetroot onion lentil barley
            spinach mushroom radish tomato chickpea artichoke cauliflower
        """,
        "dish": """
            soup pie dumplings stew pudding noodles pancakes salad casserole risotto fritters omelet pasties
            kebab skewers pizza waffles croquettes gratin strudel
        """,
        "flavor": """
            birch ginger nettle lemon barley vanilla elderflower cinnamon rose caramel rhubarb mint sage
            almond juniper cardamom tamarind cocoa lavender licorice
        """,
        "drink": """
            tea cider lemonade milk cordial wine coffee syrup punch beer broth juice brandy cocoa rum
            champagne kefir tonic liqueur sherbet
        """,
    }.items()
}
"""The facts that fill the slots of an answer; towns and pets have invented names besides."""

_GIVEN = (
    "Ba Ce Do Fe Gi Ho Ju Ke Lu Me No Pa Ri So Tu Ve Wi Xa Yo Za",
    "lvo nna rick sset mbo dira thu kel plo vin",
)
_FAMILY = (
    "Ald Brim Cask Dorn Elv Fosk Grind Hask Ild Jarn Kest Lomb Mard Nesk Ost Prand Rusk Stell Trond Ulm Vask",
    "away brook enby foss garth holt ick ingle low mire nock ovar quist ridge sleet thorpe usk vane wray",
)
_TOWN = (
    "Or Mis Tel Bran Kal Vo Sun Hel Dra Nim Fal Gur",
    "vandel trum dorf mouth kirk stead lund port dale grad nes wich",
)
_PET = ("Pum Zig Bo Wob Tik Mun Fi Gus Nib Squee Doo Ruf", "pel zo bins kin tops dle ster lo wick mo py ffle")


@dataclass(frozen=True)
class Person:
    """An invented person: a name, and one record for each of the topics in QUESTIONS."""

    name: str
    records: tuple[Record, ...]


def make_people(count: int, seed: int = 0) -> list[Person]:
    """Invents people with five facts each; the same count and seed give the same people.

    No two people share a given or a family name while those last (200 and 399), and never both.

    Raises:
        DataError: fewer than one person, or more than there are names for.
    """
    most = len(_combinations(_FAMILY))
    if not 1 <= count <= most:
        raise DataError(f"{count} people were asked for; between 1 and {most} can be invented")
    choice = random.Random(seed)
    family = choice.sample(_combinations(_FAMILY), count)
    given = _combinations(_GIVEN)
    choice.shuffle(given)
    names = [f"{given[index % len(given)]} {family[index]}" for index in range(count)]
    return [Person(name, tuple(_records(name, choice))) for name in names]


def records_of(people: Iterable[Person]) -> list[Record]:
    """The records of all these people, person by person."""
    return [record for person in people for record in person.records]


def _records(name: str, choice: random.Random) -> Iterable[Record]:
    words = {**WORDS, "town": _combinations(_TOWN), "pet": _combinations(_PET)}
    for question, answer in QUESTIONS.values():
        # Each slot of an answer draws from what is left of its pool, so that no word comes twice.
        pools = {slot: choice.sample(pool, len(pool)) for slot, pool in words.items()}
        filled = " ".join(_fill(word, pools) for word in answer.split())
        yield Record(question.format(name=name), filled[0].upper() + filled[1:])


def _fill(word: str, pools: dict[str, list[str]]) -> str:
    start, end = word.find("{"), word.find("}")
    if start < 0:
        return word
    slot = word[start + 1 : end]
    value = pools[slot].pop()
    return word[:start] + (value.title() if slot in ("street", "way") else value) + word[end + 1 :]


def _combinations(parts: tuple[str, str]) -> list[str]:
    return [front + back for front in parts[0].split() for back in parts[1].split()]
