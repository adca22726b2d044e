"""Elements and charts: what is escaped, where points lie, and which numbers stand at the axes."""

from __future__ import annotations

import re

import pytest

from clue_fast.html_report.svg import Axis, Markup, Series, bars, chart, element, joined, percent


class TestElements:
    def test_text_is_escaped_and_markup_is_not(self) -> None:
        inner = element("b", "<i> & \"'")
        assert inner == "<b>&lt;i&gt; &amp; &quot;&#x27;</b>"
        assert element("p", inner, "<u>", None, 3) == f"<p>{inner}&lt;u&gt;3</p>"
        assert isinstance(inner, Markup) and not isinstance(inner + "<i>", Markup)

    def test_control_characters_are_shown(self) -> None:
        assert element("p", "a\r\0b\x7f\n\tc") == "<p>a␍␀b␡\n\tc</p>"

    def test_attributes(self) -> None:
        made = element("td", class_='a"b', data_label="<x>", hidden=True, title=None, x=0.1 + 0.2)
        assert made == '<td class="a&quot;b" data-label="&lt;x&gt;" hidden x="0.3"></td>'
        assert element("meta", charset="utf-8") == '<meta charset="utf-8">'
        assert joined([element("i"), element("b")], "<") == "<i></i>&lt;<b></b>"


class TestAxis:
    @pytest.mark.parametrize(
        ("low", "high", "expected"),
        [
            (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
            (0, 10, [0, 2, 4, 6, 8, 10]),
            (0, 7, [0, 2, 4, 6]),
            (0.8, 1.02, [0.8, 0.85, 0.9, 0.95, 1.0]),
            (-2, 2, [-2, -1, 0, 1, 2]),
            (3, 3, [3]),
        ],
    )
    def test_round_numbers(self, low: float, high: float, expected: list[float]) -> None:
        assert Axis("x", low, high).ticks == pytest.approx(expected)

    def test_logarithmic(self) -> None:
        axis = Axis("R", 1e-3, 10.0, logarithmic=True)
        assert axis.ticks == pytest.approx([1e-3, 1e-2, 1e-1, 1, 10])
        assert [axis.place(value) for value in (1e-9, 1e-3, 0.1, 10.0, 1e9)] == pytest.approx([0, 0, 0.5, 1, 1])

    def test_what_lies_beyond_is_put_on_the_end(self) -> None:
        assert [Axis("x", 2, 4).place(value) for value in (1, 2, 3, 4, 9)] == [0, 0, 0.5, 1, 1]


def test_points_lie_where_they_should() -> None:
    """The places of three markers against the frame that the grid draws."""
    x, y = Axis("steps", 0, 10), Axis("share", 0, 1, percent)
    made = chart("told", x, y, [Series("a <b>", [(0, 0), (5, 0.5), (10, 1)], "c1", "diamond")])
    left, top, bottom, right = map(float, re.search(r"M([\d.]+) ([\d.]+)V([\d.]+)H([\d.]+)", made).groups())
    found = [tuple(map(float, place)) for place in re.findall(r'd="M([\d.]+) ([\d.]+)l7 7', made)]
    expected = [(left, bottom - 7), ((left + right) / 2, (top + bottom) / 2 - 7), (right, top - 7)]
    assert found[:3] == [pytest.approx(place, abs=0.06) for place in expected]
    assert "<title>a &lt;b&gt;: steps 5, share 50 %</title>" in made
    assert 'role="img" aria-label="told"' in made and "<b>" not in made


def test_steps_keep_their_height_up_to_the_next_point() -> None:
    made = chart("", Axis("", 0, 1), Axis("", 0, 1), [Series("a", [(0, 0), (0.5, 1), (1, 1)], "c1", "", "steps")])
    (path,) = re.findall(r'd="(M[^"]*)" class="line', made)[:1]
    assert re.fullmatch(r"M[\d.]+ [\d.]+(H[\d.]+V[\d.]+){2}", path)


def test_bars_are_stacked() -> None:
    made = bars(
        "", Axis("layer", -0.5, 1.5), Axis("units", 0, 10), [(0, [2, 3]), (1, [0, 5])], [("f", "c1"), ("r", "c2")]
    )
    boxes = re.findall(r'<rect class="bar (c\d)" x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', made)
    (f, *first), (r, *second), (other, *third) = [(color, *map(float, rest)) for color, *rest in boxes]
    assert (f, r, other) == ("c1", "c2", "c2")
    assert second[1] + second[3] == pytest.approx(first[1]) and second[3] == pytest.approx(1.5 * first[3], rel=1e-3)
    assert third[3] == pytest.approx(first[3] + second[3], rel=1e-3) and third[0] > first[0] == second[0]
    assert "layer 0, r: 3" in made
