"""Tables of text."""

from clue_fast.tables import aligned, markdown

ROWS = [["set", "metric", "before"], ["forget", "recall", "1.0"], ["held out", "p", "0.25"]]


def test_lines() -> None:
    assert aligned(ROWS) == ["set       metric  before", "forget    recall     1.0", "held out       p    0.25"]
    assert aligned(ROWS, left=3) == ["set       metric  before", "forget    recall  1.0", "held out  p       0.25"]


def test_markdown() -> None:
    assert markdown(ROWS, left=2) == (
        "| set      | metric | before |\n"
        "| -------- | ------ | -----: |\n"
        "| forget   | recall |    1.0 |\n"
        "| held out | p      |   0.25 |"
    )
    assert markdown(ROWS[:1], left=0) == "| set | metric | before |\n| --: | -----: | -----: |"
