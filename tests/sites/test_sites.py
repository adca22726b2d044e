"""Sites are found by structure; a fingerprint tells models apart; a part says what a unit owns."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from clue_fast.errors import SiteError
from clue_fast.sites import ParamSlice, Site, find_sites, model_fingerprint, survey


class Unheard(nn.Module):
    """A gated MLP of a class that nobody has seen."""

    def __init__(self, width: int = 8, units: int = 24, activation: object = F.silu) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, units, bias=False)
        self.up_proj = nn.Linear(width, units, bias=False)
        self.down_proj = nn.Linear(units, width, bias=False)
        self.act_fn = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes))


class TestFindSites:
    def test_llama(self) -> None:
        sites = find_sites(llama())
        assert [site.path for site in sites] == [f"model.layers.{layer}.mlp" for layer in range(3)]
        assert [(site.kind, site.width, site.layer, site.activation) for site in sites] == [
            ("mlp", 40, layer, "silu") for layer in range(3)
        ]

    def test_parts_name_weights_of_the_model_with_one_slice_a_unit(self) -> None:
        model = llama()
        for site in find_sites(model):
            assert [part.parameter.split(".")[-2] for part in site.slices] == ["gate_proj", "up_proj", "down_proj"]
            for part in site.slices:
                assert model.get_parameter(part.parameter).shape[part.dim] == site.width

    def test_a_class_nobody_has_seen(self) -> None:
        (site,) = find_sites(Stack(nn.Linear(2, 2), Unheard(activation=nn.GELU(approximate="tanh"))))
        assert (site.path, site.layer, site.width, site.activation) == ("blocks.1", 1, 24, "gelu_tanh")
        assert find_sites(Unheard())[0].inputs == ("gate_proj", "up_proj")

    def test_what_only_looks_like_one_is_left_alone(self) -> None:
        narrow, packed = Unheard(), Unheard()
        narrow.up_proj = nn.Linear(8, 23)
        packed.gate_proj = nn.Embedding(24, 8)
        with pytest.raises(SiteError, match="Stack has no site of kind mlp, expert"):
            find_sites(Stack(narrow, packed))

    def test_an_activation_that_is_not_known_has_no_name(self) -> None:
        assert [site.activation for site in find_sites(Unheard(activation=torch.cos))] == [None]

    def test_a_model_without_sites(self) -> None:
        with pytest.raises(SiteError, match="Linear has no site"):
            find_sites(nn.Linear(2, 2))

    def test_on_the_meta_device(self) -> None:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(llama().config)
        assert find_sites(model) == find_sites(llama())


class Pair(nn.Module):
    """Two projections, and what a subclass does with them."""

    def __init__(self, width: int = 8, units: int = 24) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, units), nn.Linear(units, width)
        self.norm = nn.LayerNorm(width)


class ThroughAnEmbeddingOfAnotherWidth(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.second(self.first(x) * 0.5))


class GatesAnInputOfTheLayer(Pair):
    def forward(self, x: Tensor, per_layer_input: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(x)) * per_layer_input[..., :1])


class SharesAcrossTokens(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(x).cumsum(1)))


class HasAnotherNetworkBetween(Pair):
    def __init__(self) -> None:
        super().__init__()
        self.between = nn.Conv1d(24, 24, 1, groups=24)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.between(F.silu(self.first(x))))


class Routes(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.second(F.silu(self.first(x))))


class IsAnMLP(Pair):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + 0.5 * self.second(F.silu(self.first(x))))


class NormWithAGate(nn.Module):
    """A norm whose gate is made by two projections, in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(8), IsAnMLP()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y * torch.sigmoid(self.mlp(y))


class WithAnMLP(nn.Module):
    """A layer with an MLP, and projections of its own whose forward takes what nobody knows."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp, self.per_layer_input_gate, self.per_layer_projection = Unheard(), nn.Linear(8, 5), nn.Linear(5, 8)

    def forward(self, x: Tensor, per_layer_input: Tensor | None = None) -> Tensor:
        x = x + self.mlp(x)
        return x + self.per_layer_projection(F.silu(self.per_layer_input_gate(x)) * per_layer_input)


class Scaled(Unheard):
    """A gated MLP in a parametrization that multiplies its gate and what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.up_proj(x) * self.act_fn(self.gate_proj(x) * 0.88)) * 0.35


class KeepsTheGreatest(Unheard):
    """A gated MLP whose gate is 0 but for those some standard deviations above the mean of all."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = F.relu(gate - gate.mean(-1, keepdim=True) - gate.std(-1, keepdim=True, unbiased=False))
        return self.down_proj(F.gelu(gate) * self.up_proj(x))


class TestWhatIsAnMLP:
    @pytest.mark.parametrize(
        "kind",
        [
            ThroughAnEmbeddingOfAnotherWidth,
            GatesAnInputOfTheLayer,
            SharesAcrossTokens,
            HasAnotherNetworkBetween,
            Routes,
            NormWithAGate,
        ],
    )
    def test_two_projections_are_none_that(self, kind: type[nn.Module]) -> None:
        found = survey(Stack(IsAnMLP(), kind()))
        assert [site.path for site in found.sites] == ["blocks.0"]
        assert not found.unmatched

    def test_a_layer_with_an_mlp_and_more(self) -> None:
        found = survey(Stack(WithAnMLP(), WithAnMLP()))
        assert [site.path for site in found.sites] == ["blocks.0.mlp", "blocks.1.mlp"]
        assert not found.unmatched

    @pytest.mark.parametrize("function", [F.silu, F.gelu, torch.relu, lambda x: torch.relu(x) ** 2])
    def test_multipliers(self, function: object) -> None:
        (site,) = find_sites(Scaled(activation=function))
        assert site.activation is not None
        assert site.multipliers == pytest.approx((0.88, 0.35), rel=1e-12)

    def test_multipliers_outlive_a_file(self) -> None:
        (site,) = find_sites(Scaled())
        assert Site.from_dict(json.loads(json.dumps(site.as_dict()))) == site

    def test_channels_that_share_mean_and_variance_are_units(self) -> None:
        (site,) = find_sites(KeepsTheGreatest())
        assert (site.structure, site.width, site.activation) == ("gated", 24, None)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.SiLU(), "silu"),
        (lambda x: x * torch.sigmoid(x), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (torch.relu, "relu"),
        (lambda x: torch.relu(x) ** 2, "relu2"),
    ],
)
def test_activations_are_known_by_what_they_compute(function: object, name: str | None) -> None:
    assert [site.activation for site in find_sites(Unheard(activation=function))] == [name]


class TestFingerprint:
    def test_is_the_same_for_the_same_model_in_any_precision(self) -> None:
        assert model_fingerprint(llama()) == model_fingerprint(llama()) == model_fingerprint(llama().bfloat16())

    def test_survives_training_of_the_units(self) -> None:
        model = llama()
        before = model_fingerprint(model)
        with torch.no_grad():
            for site in find_sites(model):
                model.get_submodule(site.output).weight.mul_(2)
        assert model_fingerprint(model) == before

    def test_differs_for_other_shapes_and_other_weights(self) -> None:
        other = llama()
        with torch.no_grad():
            other.get_input_embeddings().weight.add_(0.1)
        models = [llama(), llama(intermediate_size=41), llama(num_hidden_layers=2), other]
        assert len({model_fingerprint(model) for model in models}) == 4


class TestPart:
    @pytest.mark.parametrize(
        ("part", "units", "slices"),
        [
            (ParamSlice("w", 0), [3, 1], [3, 1]),
            (ParamSlice("w", 0, offset=10), [0, 2], [10, 12]),
            (ParamSlice("w", 0, offset=1, stride=2), [0, 2], [1, 5]),
            (ParamSlice("w", 1, offset=5, stride=4, size=4), [2, 0], [13, 14, 15, 16, 5, 6, 7, 8]),
            (ParamSlice("w", 0, size=3), [], []),
        ],
    )
    def test_index(self, part: ParamSlice, units: list[int], slices: list[int]) -> None:
        index = part.index(torch.tensor(units, dtype=torch.int32))
        assert index.dtype == torch.int64
        assert index.tolist() == slices

    def test_slices_of_all_units_cover_a_packed_weight_once(self) -> None:
        def all_of(part: ParamSlice) -> Tensor:
            return part.index(torch.arange(7))

        gate, up = ParamSlice("w", 0, offset=0, stride=2), ParamSlice("w", 0, offset=1, stride=2)
        assert torch.cat([all_of(gate), all_of(up)]).sort().values.tolist() == list(range(14))
