"""What is not finite, what is not known, and what the report says."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clue_fast
from clue_fast.errors import NonFiniteError, PatchError, SiteError, UnknownNameError
from clue_fast.sites import find_sites
from tests.models.families import make_batch, make_model
from tests.models.test_families import assert_same, record, trace

IDS = torch.arange(3, 31).reshape(4, 7)


def spoil(model: Any, layer: int = 1, token: int = 10, value: float = float("nan")) -> Any:
    """Makes one layer give something that is not finite where the batch holds a token."""
    embedding = model.get_input_embeddings()
    norm = model.model.layers[layer].post_attention_layernorm
    seen: dict[str, Tensor] = {}
    handles = [
        embedding.register_forward_pre_hook(lambda _, args: seen.update(ids=args[0])),
        norm.register_forward_hook(lambda _, args, y: torch.where((seen["ids"] == token)[..., None], value, y)),
    ]
    return handles


class TestNotFinite:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_raise(self, value: float) -> None:
        model = make_model("llama")
        with clue_fast.patch(model) as patched:
            spoil(model, value=value)
            with (
                pytest.raises(NonFiniteError, match=r"1 of 2 sites, first model\.layers\.1\.mlp"),
                patched.record("forget"),
            ):
                model(IDS)

    @pytest.mark.parametrize("name", ["gated", "heads", "experts", "plain"])
    def test_skip_batch(self, name: str) -> None:
        """The batch leaves nothing at any site, also none of its gradients; those around it all."""
        family, kinds = {
            "gated": ("llama", ("mlp",)),
            "heads": ("llama", ("attention",)),
            "experts": ("mixtral", ("expert",)),
            "plain": ("phi3", ("mlp", "attention")),
        }[name]
        model = make_model(family)
        rows = [IDS[row : row + 1] for row in range(4)]

        def run(batches: list[Tensor], **how: Any) -> clue_fast.Statistics:
            with clue_fast.patch(model, kinds=kinds) as patched:
                with patched.record("forget", gradients=True, **how):
                    for ids in batches:
                        model(ids, labels=ids).loss.backward()
                return patched.statistics

        expected = run([rows[0], rows[2], rows[3]])
        handles = spoil(model)  # token 10 is in the second row
        found = run(rows, on_nonfinite="skip_batch")
        for handle in handles:
            handle.remove()
        assert_same(found, expected)
        assert int(found.skipped) == 1
        assert int(run([rows[1]], on_nonfinite="skip_batch").skipped) == 0

    def test_skip_batch_compiled(self) -> None:
        model = make_model("llama")
        with torch.no_grad():
            expected = record(model, {"input_ids": IDS[1:]})
            with clue_fast.patch(model) as patched:
                spoil(model, token=int(IDS[0, 0]))
                compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
                with patched.record("forget", on_nonfinite="skip_batch"):
                    compiled(IDS[:1])
                    compiled(IDS[1:])
        torch.compiler.reset()
        assert_same(patched.statistics, expected)
        assert int(patched.statistics.skipped) == 1

    @pytest.mark.parametrize(("family", "kinds"), [("llama", ("mlp", "attention")), ("mixtral", ("expert",))])
    def test_count(self, family: str, kinds: tuple[str, ...]) -> None:
        """A token is left out where it is not finite, and counted there; elsewhere it counts as ever."""
        model = make_model(family)
        with clue_fast.patch(model, kinds=kinds) as patched, torch.no_grad():
            spoil(model)
            group = torch.tensor([2, 1, 1, 2])
            with patched.record("forget", on_nonfinite="count"):
                model(IDS, token_group=group)
            text = str(patched.report())
        statistics = patched.statistics
        per_token = 2 if family == "mixtral" else 1  # experts a token
        for layer, lost in ((0, 0), (1, per_token)):
            numbers = [
                statistics.number(s) for s in statistics.sites if s.layer == layer and s.kind in ("mlp", "expert")
            ]
            assert int(statistics.nonfinite[0, numbers].sum()) == lost
            assert int(statistics.count[0, numbers].sum()) == 14 * per_token - lost
            assert int(statistics.nonfinite[1].sum()) == 0
        assert bool(torch.isfinite(statistics.values).all())
        assert f"{per_token} tokens not finite" in text

    def test_what_counting_leaves_is_exact(self) -> None:
        model = make_model("llama")
        token = int(IDS[1, 3])
        group = IDS.ne(token).to(torch.int8)
        with torch.no_grad():
            handles = spoil(model, layer=1, token=token)
            with clue_fast.patch(model) as patched, patched.record("forget", on_nonfinite="count"):
                model(IDS)
            for handle in handles:
                handle.remove()
            expected = record(model, {"input_ids": IDS, "token_group": group})
        site = patched.sites[1]
        found, wanted = (s.values[0, :, s.units(site)] for s in (patched.statistics, expected))
        assert int(patched.statistics.count[0, 1]) == 27
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)

    def test_an_unknown_treatment(self) -> None:
        with (
            clue_fast.patch(make_model("llama")) as patched,
            pytest.raises(UnknownNameError, match="ignore"),
            patched.record("forget", on_nonfinite="ignore"),
        ):
            pass


class Shifted(nn.Module):
    """A gated MLP and something more."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)) + 1.0


class Mish(Shifted):
    """A gated MLP with an activation that there is no operator for."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.mish(self.gate_proj(x)) * self.up_proj(x))


class Mixed(Shifted):
    """The channels of this one depend on each other."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(torch.softmax(self.gate_proj(x), -1) * self.up_proj(x))


class Hidden(Shifted):
    """The projections of this one are called the other way round, and its activation is a function."""

    def __init__(self, inner: nn.Module) -> None:
        nn.Module.__init__(self)
        self.w2, self.w3, self.w1 = inner.down_proj, inner.up_proj, inner.gate_proj

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.w3(x) * nn.functional.relu(self.w1(x)).square())


def with_mlp(kind: type[Shifted]) -> Any:
    model = make_model("llama")
    model.model.layers[1].mlp = kind(model.model.layers[1].mlp)
    return model


class TestStrict:
    @pytest.mark.parametrize("kind", [Shifted, Mish])
    def test_what_cannot_be_fused(self, kind: type[Shifted]) -> None:
        """Strict, it is named; otherwise it is recorded all the same, through a hook, and the report says so."""
        model, batch = with_mlp(kind), make_batch("llama")
        before = trace(model)
        with pytest.raises(SiteError, match=rf"model\.layers\.1\.mlp \({kind.__name__}\) does not compute down"):
            clue_fast.patch(model)
        assert trace(model) == before
        seen: list[Tensor] = []
        handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        with clue_fast.patch(model, strict=False) as patched, torch.no_grad():
            with patched.record("forget", tokens="attended"):
                model(**batch)
            entries = patched.report().sites
        handle.remove()
        assert [entry.fused for entry in entries] == [True, False]
        assert "not fused" in entries[1].reason
        kept = seen[0].double()[batch["attention_mask"].bool()]
        found = patched.statistics.of(patched.sites[1], "forget")
        torch.testing.assert_close(found.mean, kept.mean(0), rtol=1e-5, atol=1e-8)
        assert trace(model) == before

    def test_what_is_not_known(self) -> None:
        model = with_mlp(Mixed)
        with pytest.raises(SiteError, match=r"1 modules look like sites.*model\.layers\.1\.mlp \(Mixed\)"):
            clue_fast.patch(model)
        with clue_fast.patch(model, strict=False) as patched:
            text = str(patched.report())
        assert [site.path for site in patched.sites] == ["model.layers.0.mlp"]
        assert "model.layers.1.mlp" in text
        assert "not recorded: the input of down_proj" in text
        assert "1 of 2 sites recorded" in text

    def test_names_do_not_matter(self) -> None:
        model, batch = with_mlp(Hidden), make_batch("llama")
        site = find_sites(model)[1]
        assert (site.structure, site.activation) == ("gated", "relu2")
        assert [path.rpartition(".")[2] for path in (*site.inputs, site.output)] == ["w1", "w3", "w2"]
        with torch.no_grad():
            expected = model(**batch).logits
            with clue_fast.patch(model):
                torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-5, atol=1e-6)

    def test_heads_that_cannot_be_reached(self) -> None:
        model = make_model("qwen2_vl")
        with pytest.raises(SiteError, match=r"visual\.blocks\.0\.attn.*could not be measured"):
            clue_fast.patch(model, kinds=("attention",))
        with clue_fast.patch(model, kinds=("attention",), strict=False) as patched:
            assert {site.path.split(".")[1] for site in patched.sites} == {"language_model"}

    def test_kinds_that_the_model_has_not(self) -> None:
        with pytest.raises(SiteError, match="no site of kind expert"):
            clue_fast.patch(make_model("llama"), kinds=("expert",))
        with pytest.raises(UnknownNameError, match="neuron"):
            clue_fast.patch(make_model("llama"), kinds=("neuron",))

    def test_one_kind_of_heads(self) -> None:
        sites = find_sites(make_model("llama"), ("attention_key_value",))
        assert {site.kind for site in sites} == {"attention_key_value"}
        assert {site.width for site in sites} == {2}


class Cells(HTMLParser):
    """The cells of a table, row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


class TestReport:
    def test_text_json_and_html_say_the_same(self) -> None:
        model, batch = make_model("qwen2_moe"), make_batch("qwen2_moe")
        with clue_fast.patch(model, kinds=("mlp", "expert", "attention"), backend="reference") as patched:
            with patched.record("forget"), torch.no_grad():
                model(**batch)
                model(**batch, token_group=torch.tensor([2, 2, 2]))
            report = patched.report()
        data = json.loads(report.to_json())
        by_kind = {(entry["path"], entry["kind"]): entry for entry in data["sites"]}
        shared = by_kind["model.layers.0.mlp.shared_expert", "mlp"]
        assert shared["fused"] is True
        assert shared["launches"] == 2
        assert shared["tokens"] == {"forget": 15, "retain": 15}  # 17 labels, two of them of first tokens
        experts = by_kind["model.layers.0.mlp.experts", "expert"]
        assert (experts["experts"], experts["tokens"]["forget"]) == (4, 30)
        assert all(entry["backend"] == "reference" for entry in data["sites"])
        text, cells = str(report), Cells()
        cells.feed(report.to_html())
        assert len(cells.rows) == len(data["sites"]) + 1
        for entry, row in zip(data["sites"], cells.rows[1:], strict=True):
            assert row[0] == entry["path"]
            assert " ".join(row[0:1]) in text
            assert f"forget {entry['tokens']['forget']}" in row[6]
        assert data["fingerprint"] in text
        assert report._repr_html_() == report.to_html()

    def test_compiled_code_counts_tokens(self) -> None:
        model = make_model("llama")
        with clue_fast.patch(model) as patched, patched.record("forget"), torch.no_grad():
            torch.compile(model, fullgraph=True, backend="eager")(IDS)
            entry = patched.report().sites[0]
        torch.compiler.reset()
        assert entry.tokens == {"forget": 28, "retain": 0}


def test_statistics_of_sites_that_they_do_not_have() -> None:
    llama, gpt2 = (record(make_model(name), make_batch(name)) for name in ("llama", "gpt2"))
    with pytest.raises(PatchError, match=r"transformer\.h\.0\.mlp is none of the 2 sites"):
        llama.of(gpt2.sites[0], "forget")
