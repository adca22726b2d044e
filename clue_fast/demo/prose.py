"""A text of nothing in particular, which a model should predict as well as before, whatever it forgets."""

from __future__ import annotations

import os
from pathlib import Path

TOKENS = 2048
WINDOW = 256
"""How much of it is read, and how many tokens know of one another."""

PROSE = """\
The bakery on the corner opens before it is light. Whoever passes at five in the morning sees one lit window and
behind it a woman who lifts trays out of the oven with a long wooden board. She does not look up. The bread has to be
turned, the rolls have to be brushed with milk, and the van that takes half of it to the hospital leaves at six. Her
father did the same work in the same room, and the scale on the shelf, which nobody uses any more, was his.

It rained for most of that spring. The river rose slowly at first and then, within a single night, it stood in the
lower gardens. People carried their tools and their potted plants to the attic, and the children thought it was a
holiday. When the water went down again it left a line on the walls, brown and perfectly straight, which could be seen
for years afterwards. Some families painted over it. Others wrote the date beside it, as one writes the height of a
child beside a door.

A good way to learn how a machine works is to take it apart, but only if somebody is there who can put it together. The
first clock I opened was an old alarm clock with a cracked face. Inside there was a spring, coiled so tightly that it
jumped across the table when I loosened the last screw, and a row of small wheels, each of which turned the next one a
little more slowly. I understood the wheels. I did not understand how the spring could know what time it was, and I was
disappointed to hear that it did not.

Most meetings are too long because nobody has decided what they are for. If a question can be answered by one person,
ask that person. If it needs several, write down what you think the answer is, send it round, and meet only about the
points on which you disagree. This sounds harsh, and some colleagues will miss the conversation. They can still have it
over lunch, where it is more pleasant and where nobody takes notes.

The path climbs through the forest for an hour, crosses a stream on three flat stones, and comes out on a meadow from
which both valleys can be seen. In summer there are cows, and a farmer sells cheese from a hut with a stone roof. Take
water with you, since the spring beside the hut is often dry in August, and do not rely on the last bus: it leaves
when the driver has finished his coffee. If the clouds are already on the ridge when you reach the stream, turn back.
The way down is slippery in the wet, and there is no shelter before the first houses.
"""
"""Written for this package, some 500 words."""


def general_text() -> tuple[str, str]:
    """A name and a text: the test set of WikiText-2 where the folder CLUE_FAST_DATA has it, or else the one above."""
    file = Path(os.environ.get("CLUE_FAST_DATA", "")) / "wikitext2" / "test.txt"
    return ("WikiText-2", file.read_text(encoding="utf-8")) if file.is_file() else ("the built-in text", PROSE)
