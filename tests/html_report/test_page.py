"""The report, read with an HTML parser: whole, without a network, everything escaped, and nothing missing unnamed."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from clue_fast.cli import main
from clue_fast.data import Record, data_hash
from clue_fast.errors import OutputError
from clue_fast.evaluation import Attacked, Attempt, Metrics, forget_quality
from clue_fast.html_report import describe_data, html_report, run_names, site_counts, write_report
from clue_fast.html_report.svg import VOID
from clue_fast.selection import CONFLICT, FORGET, Selection
from clue_fast.sites import Site

EVIL = '<script>alert("&amp;")</script><img src=http://x.org/a.png onerror=x>'
FORGET_SET = [Record("Who?", "Ada Lovelace"), Record(f"Where {EVIL}", f"In {EVIL}"), Record("When?", "In 1815")]
RETAIN_SET = [Record("How long?", "Nine miles"), Record("How deep?", "Two miles")]
RATIOS = {"before": [0.01, 0.02, 0.001], "after": [0.9, 1.5, 0.4], "retrained": [0.8, 1.2, 0.5]}


def figures(
    recalls: list[float], answers: list[str], ratios: list[float] = (), attacks: dict[str, Any] | None = None
) -> dict:
    losses, mean = [1.0 - recall for recall in recalls], sum(recalls) / len(recalls)
    answered = sum(recall >= 0.5 for recall in recalls) / len(recalls)
    lists = {"losses": losses, "accuracies": recalls, "rouge_recalls": recalls, "answers": answers}
    made = Metrics(len(recalls), 1.0 - mean, mean, mean, mean, answered, forgotten=bool(ratios), **lists)
    return replace(made, truth_ratios=list(ratios), attacks=attacks or {}).as_dict()


def attacked(brought: float) -> dict[str, Any]:
    def attempt(variant: str, recall: float, step: int | None = None) -> Attempt:
        return Attempt(variant, [0, 1], [f"said {EVIL}", "nothing"], [recall, 0.0], step)

    curve = tuple(attempt(f"after {step} steps on 1 records", brought if step else 0.0, step) for step in (0, 2, 4))
    found = [
        Attacked("greedy", "as it is", (attempt("greedy", 0.0),)),
        Attacked("relearning", "relearning", curve),
        Attacked("rounding", "rounded weights", (attempt("int4 by output channel", 0.2),)),
        Attacked("rewordings", "rewordings", skipped="no record has its question in other words"),
    ]
    return {one.name: one.as_dict() for one in found}


HASHES = {"hash": {"before": "b4", "after": "af7"}}
SITES = [
    Site(f"layers.{layer}.mlp", "mlp", 12, layer, f"{layer}.gate", f"{layer}.up", f"{layer}.down", "silu")
    for layer in range(3)
]


def selection() -> Selection:
    categories = {site: torch.zeros(12, dtype=torch.int8) for site in SITES}
    categories[SITES[0]][[0, 5, 7]] = CONFLICT
    categories[SITES[2]][3] = FORGET
    return Selection(SITES, categories, {site: torch.rand(12) for site in SITES}, {}, "f")


def results() -> dict[str, Any]:
    """As of a run, with half of the forget questions answered before and none after."""
    evaluation = {}
    for stage, recall, brought in (("before", 1.0, 1.0), ("after", 0.25, 1.0), ("retrained", 0.0, 0.0)):
        answers = [f"{stage} {EVIL}", "two", "three"]
        evaluation[stage] = {
            "forget": figures([recall] * 3, answers, RATIOS[stage], attacked(brought)),
            "retain": figures([1.0, 0.8 if stage == "after" else 1.0], ["Nine miles", EVIL]),
        }
    return {
        "clue_fast": "1.2",
        "settings": {"criterion": EVIL, "learning_rate": 0.006, "kinds": ["mlp"]},
        **describe_data({"forget": FORGET_SET, "retain": RETAIN_SET}),
        "evaluation": evaluation,
        "selection": {"units": 4, "of": 36, "hash": "5e1ec7", "sites": site_counts(selection())},
        "weights": {"total": 99, "trained": 9, "changed_inside": 9, "changed_outside": 0} | copy.deepcopy(HASHES),
        "history": [
            {"step": 1, "forget_loss": 3.0, "retain_loss": 1.0},
            {"step": 2, "forget_loss": 2.0, "retain_loss": 1.0, "forget_recall": 0.5},
        ],
        "seconds": {"train": 12.34},
    }


class Page(HTMLParser):
    """Reads a page strictly: every tag is closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open
        self.text = " ".join(self.data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.data.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def page() -> Page:
    return Page(html_report({f"run {EVIL}": results()}))


class TestOneFile:
    def test_needs_no_network_and_runs_no_script(self, page: Page) -> None:
        text = html_report({"run": results()})
        assert text.startswith("<!doctype html>")
        names = {name for name, _ in page.tags}
        assert not names & {"script", "img", "link", "iframe", "object", "embed", "base", "form", "image", "use"}
        for _, attributes in page.tags:
            assert not any(name.startswith("on") for name in attributes)
            assert not {"src", "srcset", "data", "action", "xlink:href", "style"} & attributes.keys()
            assert (attributes.get("href") or "#").startswith("#")
        (style,) = re.findall(r"<style>(.*?)</style>", text, flags=re.S)
        assert "url(" not in style and "@import" not in style and "http" not in style
        (policy,) = [one["content"] for one in page.all("meta") if "http-equiv" in one]
        assert policy == "default-src 'none'; style-src 'unsafe-inline'"

    def test_what_data_and_models_say_is_text(self, page: Page) -> None:
        for text in (f"Where {EVIL}", f"In {EVIL}", f"before {EVIL}", f"after {EVIL}", f"said {EVIL}", f"run {EVIL}"):
            assert text in page.text
        assert page.text.count(EVIL) > 10

    def test_is_accessible(self, page: Page) -> None:
        assert page.all("html") == [{"lang": "en"}] and len(page.all("h1")) == 1
        assert [name for name, _ in page.tags if re.fullmatch(r"h\d", name)] == ["h1"] + ["h2"] * 9
        charts = [one for one in page.all("svg") if one.get("class") == "chart"]
        assert len(charts) == 7 and all(one["role"] == "img" and len(one["aria-label"]) > 30 for one in charts)
        assert all(one.get("aria-hidden") == "true" for one in page.all("svg") if one not in charts)
        assert page.all("th") and all(one.get("scope") in ("col", "row") for one in page.all("th"))
        ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
        assert len(ids) == len(set(ids)) == 9
        assert {one["href"] for one in page.all("a")} == {f"#{own}" for own in ids}
        scrolled = [one for one in page.all("div") if one.get("class") == "wide"]
        assert scrolled and all(one["tabindex"] == "0" and one["role"] == "region" for one in scrolled)

    def test_is_for_narrow_screens_dark_mode_and_print(self) -> None:
        text = html_report({"run": results()})
        assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
        assert "prefers-color-scheme: dark" in text and "@media print" in text and "@media (max-width" in text


class TestContent:
    def test_figures(self, page: Page) -> None:
        told = re.sub(r"\s+", " ", page.text)
        for text in (
            "forget questions no longer answered 100.0% of 3",
            "kept on retain 90.0% of the recall before, 2 records",
            "answered under the strongest attack 50.0% after 2 steps on 1 records",
            "units selected 11.1% 4 of 36",
            "weights changed outside the selection 0 of 99 in all",
            "forget questions answered 1.000 0.000 0.000",
            "retain ROUGE-L recall 1.000 0.900 1.000",
            "relearning after 4 steps on 1 records 2 1 (50.0%) 1 (50.0%) 0 (0.0%)",
            "rewordings was skipped: no record has its question in other words.",
            "forget: of 3 questions answered before 3, after 0, retrained 0",
            "seconds: train 12.3",
        ):
            assert text in told, text
        p = [f"{forget_quality(RATIOS[stage], RATIOS['retrained'])[0]:.1e}" for stage in ("before", "after")]
        assert f"forget forget quality (KS p) {' '.join(p)} 1.0e+00" in told
        for value in (data_hash(FORGET_SET), data_hash(RETAIN_SET), "5e1ec7", "b4", "af7"):
            assert value in told

    def test_charts_say_what_they_show(self, page: Page) -> None:
        labels = " ".join(one["aria-label"] for one in page.all("svg") if one.get("class") == "chart")
        for text in (
            "before: 0.0% forgotten, 100.0% kept; after: 100.0% forgotten, 90.0% kept; retrained: 100.0%",
            "before: 0.0% at first, 50.0% at last; after: 0.0% at first, 50.0% at last; retrained: 0.0% at first, 0.0%",
            "truth ratio R over the forget records. Medians: before: 0.01; after: 0.9; retrained: 0.8.",
            "answer probability over the forget records. Medians: before: 1; after: 0.472; retrained: 0.368.",
            "layer 0: 3, layer 1: 0, layer 2: 1",
            "forget: 3 at first, 2 at last; retain: 1 at first, 1 at last",
        ):
            assert text in labels, text

    def test_answers_stand_side_by_side(self) -> None:
        text = html_report({"run": results()})
        row = next(row for row in re.findall(r"<tr.*?</tr>", text) if "Ada Lovelace" in row and "data-label" in row)
        cells = re.findall(r'<td[^>]*class="(\w+)" data-label="(\w+)">(\w+)', row)
        assert cells == [("yes", "before", "before"), ("no", "after", "after"), ("no", "retrained", "retrained")]

    def test_long_sets_are_cut_and_it_says_so(self) -> None:
        many = results()
        many["records"]["retain"] = [{"question": f"q{n}", "answer": f"a{n}"} for n in range(250)]
        for stage in many["evaluation"].values():
            stage["retain"] = figures([1.0] * 250, [f"said{n}" for n in range(250)])
        told = Page(html_report({"run": many})).text
        assert "The first 200 of 250 are shown." in told and "said199" in told and "said200" not in told

    def test_the_half_that_scaling_did_not_look_at(self) -> None:
        scaled = results()
        scaled["scaling"] = {"reported": [3, 1]}
        for stage, own in list(scaled["evaluation"].items()):
            part = figures([1.0 if stage == "before" else 0.0] * 2, ["x", "y"], [0.5, 0.5])
            scaled["evaluation"][stage] = {"forget_reported": part, **own}
        scaled["evaluation"]["trained"] = copy.deepcopy(scaled["evaluation"]["after"])
        page = Page(html_report({"run": scaled}))
        assert "after training" in page.data and "after scaling" in page.data
        assert "forget reported: of 2 questions answered before 2, after training 0, after scaling 0" in page.text


@pytest.mark.parametrize(
    ("left_out", "named"),
    [
        (lambda r: r.pop("records"), "forget: the results do not hold questions and answers by record."),
        (lambda r: r.pop("history"), "This evaluation: no training is recorded."),
        (lambda r: r["selection"].pop("sites"), "In which layers is not known"),
        (lambda r: r.pop("selection"), "nothing was selected here, only a model measured"),
        (lambda r: r["weights"].pop("hash"), "No hash of the weights"),
        (lambda r: r.pop("settings"), None),
        (lambda r: [s["forget"].pop("attacks") for s in r["evaluation"].values()], "No attack was tried"),
        (
            lambda r: [s["forget"]["attacks"].pop("relearning") for s in r["evaluation"].values()],
            "No curve of relearning",
        ),
        (lambda r: [s["forget"].pop("truth_ratios") for s in r["evaluation"].values()], "No truth ratios"),
        (lambda r: [s.pop("retain") for s in r["evaluation"].values()], "No set that is to be kept was measured"),
        (lambda r: [s["forget"].pop("losses") for s in r["evaluation"].values()], None),
        (lambda r: [r["evaluation"].pop(s) for s in ("before", "retrained")], None),
    ],
)
def test_what_is_missing_is_named(left_out, named: str | None) -> None:
    made = results()
    left_out(made)
    told = Page(html_report({"run": made})).text
    assert named is None or named in told


def test_texts_and_skipped_metrics() -> None:
    """A text has no questions, and a metric without a value says why."""
    made = results()
    for own in made["evaluation"].values():
        own["text"] = {"count": 4, "text": True, "forgotten": False, "skipped": {}}
        own["forget"]["skipped"] = {"privacy_leakage": f"there is no {EVIL}"}
    told = Page(html_report({"run": made})).text
    assert f"forget: privacy leakage was skipped: there is no {EVIL}" in told
    assert "kept on text" not in told and "text: the results do not hold" not in told


def test_an_evaluation_alone() -> None:
    evaluation = {"model": results()["evaluation"]["after"], "retrained": results()["evaluation"]["retrained"]}
    data = describe_data({"forget": FORGET_SET, "retain": RETAIN_SET})
    page = Page(html_report({"model": {"evaluation": evaluation, "settings": {"seed": 0}, **data}}))
    assert "forget: of 3 questions answered model 0, retrained 0" in page.text


class TestComparison:
    def test_of_several_runs(self) -> None:
        other = results()
        other["settings"]["learning_rate"] = 0.1
        other["evaluation"]["after"]["forget"]["answered"] = 2 / 3
        other["evaluation"]["after"]["retain"]["rouge_recall"] = 0.99
        page = Page(html_report({"one": results(), "two": other}))
        told = re.sub(r"\s+", " ", page.text)
        assert "set metric before one two retrained forget questions answered 1.000 0.000 0.667 0.000" in told
        assert "best of these (Pareto front)" in told
        assert "learning rate (differs)" in page.data and "criterion (differs)" not in page.data
        assert "criterion" in page.data
        assert "forget: of 3 questions answered before 3, one 0, two 0, retrained 0" in told

    def test_runs_of_other_records_are_named(self) -> None:
        other = results()
        other["records"]["forget"] = [{"question": "?", "answer": "!"}] * 3
        told = Page(html_report({"one": results(), "two": other})).text
        assert "two is left out here: its forget records are others." in told

    def test_names(self, tmp_path: Path) -> None:
        assert list(run_names([tmp_path / "a" / "out"])) == ["out"]
        assert list(run_names([tmp_path / "a" / "out", tmp_path / "b" / "out"])) == ["a/out", "b/out"]
        assert list(run_names([tmp_path / "a", tmp_path / "a"])) == ["a"]


def test_the_command(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results()))
    assert main(["report", f"{tmp_path}/one"]) == 0
    assert (tmp_path / "one" / "report.html").read_text() == html_report({"one": results()})
    assert main(["report", f"{tmp_path}/one", f"{tmp_path}/two"]) == 0
    assert (tmp_path / "one" / "comparison.html").read_text() == html_report({"one": results(), "two": results()})
    assert main(["report", f"{tmp_path}/two", "--output", f"{tmp_path}/elsewhere.html"]) == 0
    assert (tmp_path / "elsewhere.html").exists() and not (tmp_path / "two" / "report.html").exists()
    assert main(["report", f"{tmp_path}/nowhere"]) == 2
    with pytest.raises(OutputError, match="choose a folder that exists"):
        write_report(tmp_path / "nowhere" / "report.html", {"one": results()})
