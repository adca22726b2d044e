"""patch, record and unpatch on one instance."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import clue_fast
from clue_fast.errors import NonFiniteError, PatchError, SiteError, UnknownNameError

TOKENS = torch.arange(3, 39).reshape(4, 9)


def state(model: nn.Module) -> list[object]:
    """Everything about a model that patching might leave behind."""
    found: list[object] = []
    for name, module in model.named_modules():
        found.append(
            (
                name,
                type(module),
                sorted(module.__dict__),
                len(module._forward_pre_hooks),
                len(module._forward_hooks),
            )
        )
    return found


def recorded(model: LlamaForCausalLM, batches: list[dict[str, torch.Tensor]]) -> clue_fast.Statistics:
    with clue_fast.patch(model) as patched:
        with patched.record("forget"), torch.no_grad():
            for batch in batches:
                model(**batch)
        return patched.statistics


def assert_close(left: clue_fast.Statistics, right: clue_fast.Statistics) -> None:
    assert torch.equal(left.count, right.count)
    torch.testing.assert_close(left.values, right.values, rtol=1e-6, atol=1e-6)


def test_unpatch_leaves_no_trace_and_other_models_are_untouched(llama: LlamaForCausalLM) -> None:
    other = copy.deepcopy(llama)
    before, weights = state(llama), {name: p.clone() for name, p in llama.state_dict().items()}
    expected = llama(TOKENS).logits
    patched = clue_fast.patch(llama)
    assert state(other) == before
    assert state(llama) != before
    patched.unpatch()
    assert state(llama) == before
    assert torch.equal(llama(TOKENS).logits, expected)
    assert all(torch.equal(p, weights[name]) for name, p in llama.state_dict().items())


def test_context_manager_unpatches_after_an_error(llama: LlamaForCausalLM) -> None:
    before = state(llama)
    with pytest.raises(KeyError), clue_fast.patch(llama) as patched, patched.record("forget"):
        raise KeyError
    assert state(llama) == before


def test_deep_copy_of_a_patched_model_records_for_itself(llama: LlamaForCausalLM) -> None:
    patched = clue_fast.patch(llama)
    twin = copy.deepcopy(llama)
    with patched.record("forget"):
        twin(TOKENS)
        llama(TOKENS)
    assert int(patched.statistics.count.max()) == TOKENS.numel()
    clue_fast.unpatch(twin)
    clue_fast.unpatch(llama)


def test_save_while_patched_is_a_plain_checkpoint(llama: LlamaForCausalLM, tmp_path) -> None:
    with clue_fast.patch(llama):
        llama.save_pretrained(tmp_path)
    assert torch.equal(LlamaForCausalLM.from_pretrained(tmp_path)(TOKENS).logits, llama(TOKENS).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(llama: LlamaForCausalLM, side: str) -> None:
    padded, mask = torch.zeros(4, 14, dtype=torch.long), torch.zeros(4, 14, dtype=torch.long)
    columns = slice(5, 14) if side == "left" else slice(0, 9)
    padded[:, columns], mask[:, columns] = TOKENS, 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    plain = recorded(llama, [{"input_ids": TOKENS}])
    assert_close(recorded(llama, [{"input_ids": padded, "attention_mask": mask, "position_ids": positions}]), plain)


def test_batch_size_does_not_matter(llama: LlamaForCausalLM) -> None:
    whole = recorded(llama, [{"input_ids": TOKENS}])
    assert_close(recorded(llama, [{"input_ids": row[None]} for row in TOKENS.flip(0)]), whole)


def test_the_same_run_twice_gives_the_same_bits(llama: LlamaForCausalLM) -> None:
    runs = [recorded(llama, [{"input_ids": TOKENS}] * 2) for _ in range(2)]
    assert torch.equal(runs[0].values, runs[1].values)


def test_token_group_splits_a_mixed_batch(llama: LlamaForCausalLM) -> None:
    group = torch.zeros_like(TOKENS, dtype=torch.int8)
    group[:2], group[2:, 3:] = 1, 2
    with clue_fast.patch(llama) as patched, torch.no_grad():
        with patched.record("forget"):
            llama(TOKENS, token_group=group)
        mixed = patched.statistics
    with clue_fast.patch(llama) as patched, torch.no_grad():
        with patched.record("forget"):
            llama(TOKENS[:2])
        forget = patched.statistics
    assert mixed.count[:, 0].tolist() == [18, 12]
    torch.testing.assert_close(mixed.values[0], forget.values[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_counts_once(llama: LlamaForCausalLM, reentrant: bool) -> None:
    def train(checkpointing: bool) -> clue_fast.Statistics:
        model = copy.deepcopy(llama).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with clue_fast.patch(model) as patched:
            with patched.record("forget", gradients=True):
                model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
            return patched.statistics

    plain, checkpointed = train(False), train(True)
    assert torch.equal(plain.count, checkpointed.count)
    assert torch.equal(plain.values, checkpointed.values)
    assert plain.gradient_values is not None and checkpointed.gradient_values is not None
    torch.testing.assert_close(plain.gradient_values, checkpointed.gradient_values, rtol=1e-6, atol=1e-9)
    assert float(plain.gradient_values.abs().sum()) > 0


def test_gradient_statistics_equal_those_of_hooks(llama: LlamaForCausalLM) -> None:
    products: dict[str, torch.Tensor] = {}

    def keep(name: str):
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            value = inputs[0].detach()
            inputs[0].register_hook(
                lambda gradient: products.__setitem__(name, (value * gradient)[:, :-1].double().flatten(0, 1))
            )

        return hook

    outputs = [site.output for site in clue_fast.find_sites(llama)]
    handles = [llama.get_submodule(path).register_forward_pre_hook(keep(path)) for path in outputs]
    llama(TOKENS, labels=TOKENS).loss.backward()
    for handle in handles:
        handle.remove()
    with clue_fast.patch(llama) as patched:
        with patched.record("forget", gradients=True):
            llama(TOKENS, labels=TOKENS).loss.backward()
        for site in patched.sites:
            found, product = patched.statistics.of(site, "forget"), products[site.output]
            torch.testing.assert_close(found.attribution, product.mean(0), rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(found.abs_attribution, product.abs().mean(0), rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(found.square_attribution, product.square().mean(0), rtol=1e-4, atol=1e-12)


def test_gradients_of_weights_equal_the_stock_model(llama: LlamaForCausalLM) -> None:
    llama(TOKENS, labels=TOKENS).loss.backward()
    stock = {name: p.grad.clone() for name, p in llama.named_parameters()}
    llama.zero_grad()
    with clue_fast.patch(llama):
        llama(TOKENS, labels=TOKENS).loss.backward()
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(parameter.grad, stock[name], rtol=1e-4, atol=1e-7)


def test_generation_counts_each_token_once(llama: LlamaForCausalLM) -> None:
    with clue_fast.patch(llama) as patched:
        with patched.record("forget"):
            llama.generate(TOKENS[:, :4], max_new_tokens=5, min_new_tokens=5, do_sample=False)
        # The last token is written but never read.
        assert int(patched.statistics.count[0, 0]) == 4 * (4 + 5 - 1)


def test_report_names_every_site_and_backend(llama: LlamaForCausalLM) -> None:
    with clue_fast.patch(llama, backend="reference") as patched:
        llama(TOKENS)
        text = str(patched.report())
    for layer in range(3):
        assert f"model.layers.{layer}.mlp" in text
    assert text.count("reference") == 3


def test_relu_and_gelu_activations_are_found_by_what_they_compute(llama: LlamaForCausalLM) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x) ** 2

    llama.model.layers[1].mlp.act_fn = Odd()
    llama.model.layers[2].mlp.act_fn = nn.GELU()
    assert [site.activation for site in clue_fast.find_sites(llama)] == ["silu", "relu2", "gelu"]
    expected = llama(TOKENS).logits
    with clue_fast.patch(llama):
        torch.testing.assert_close(llama(TOKENS).logits, expected, rtol=1e-5, atol=1e-6)


class TestBadInput:
    def test_patching_twice(self, llama: LlamaForCausalLM) -> None:
        patched = clue_fast.patch(llama)
        with pytest.raises(PatchError, match="patched already"):
            clue_fast.patch(llama)
        patched.unpatch()
        with pytest.raises(PatchError, match="not patched"):
            patched.unpatch()
        with pytest.raises(PatchError, match="not patched"):
            clue_fast.unpatch(llama)
        with pytest.raises(PatchError, match="unpatched"), patched.record("forget"):
            pass

    def test_recording_inside_recording(self, llama: LlamaForCausalLM) -> None:
        with clue_fast.patch(llama) as patched, patched.record("forget"):
            with pytest.raises(PatchError, match="already recording"), patched.record("retain"):
                pass
            with pytest.raises(PatchError, match="after the recording block"):
                patched.unpatch()

    @pytest.mark.parametrize(
        ("group", "message"),
        [(torch.zeros(4, 8), "shape"), (torch.full((4, 9), 3), "holds"), (torch.full((4, 9), -1), "holds")],
    )
    def test_token_group_that_does_not_fit(self, llama: LlamaForCausalLM, group: torch.Tensor, message: str) -> None:
        with clue_fast.patch(llama) as patched:
            with patched.record("forget"):
                with pytest.raises(PatchError, match=message):
                    llama(TOKENS, token_group=group)
                llama(TOKENS)
            assert int(patched.statistics.count[0, 0]) == TOKENS.numel()

    def test_a_model_without_sites(self) -> None:
        with pytest.raises(SiteError, match="Linear has no site"):
            clue_fast.patch(nn.Linear(3, 3))

    def test_a_module_that_computes_something_else(self, llama: LlamaForCausalLM) -> None:
        class Shifted(type(llama.model.layers[0].mlp)):  # type: ignore[misc]
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return super().forward(x) + 1.0

        llama.model.layers[1].mlp.__class__ = Shifted
        before = state(llama)
        with pytest.raises(SiteError, match=r"layers\.1\.mlp.*does not compute"):
            clue_fast.patch(llama)
        assert state(llama) == before

    def test_experts_that_are_modules_of_their_own(self, llama: LlamaForCausalLM) -> None:
        class Routed(nn.Module):
            def __init__(self, mlp: nn.Module) -> None:
                super().__init__()
                self.experts = nn.ModuleList([mlp, copy.deepcopy(mlp)])

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                y = torch.empty_like(x)
                for index, expert in enumerate(self.experts):
                    y[:, index::2] = expert(x[:, index::2])
                return y

        llama.model.layers[1].mlp = Routed(llama.model.layers[1].mlp)
        with (
            clue_fast.patch(llama) as patched,
            patched.record("forget"),
            pytest.raises(PatchError, match=r"layers\.1\.mlp\.experts\.0 sees 20 tokens.* Experts that are modules"),
        ):
            llama(TOKENS)

    def test_nan_in_weights(self, llama: LlamaForCausalLM) -> None:
        with torch.no_grad():
            llama.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
        with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp"):
            clue_fast.patch(llama)

    def test_nan_in_activations_names_the_site(self, llama: LlamaForCausalLM) -> None:
        with clue_fast.patch(llama) as patched:
            with torch.no_grad():
                llama.model.layers[1].mlp.up_proj.weight[3, 5] = float("nan")
            with (
                pytest.raises(NonFiniteError, match=r"first model\.layers\.1\.mlp"),
                patched.record("forget"),
            ):
                llama(TOKENS)
            with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp"):
                patched.statistics.of(patched.sites[1], "forget")
            assert patched.statistics.of(patched.sites[0], "forget").count == TOKENS.numel()

    def test_unknown_backend(self, llama: LlamaForCausalLM) -> None:
        with pytest.raises(UnknownNameError, match="fpga"):
            clue_fast.patch(llama, backend="fpga")

    def test_a_part_of_the_model_is_called(self, llama: LlamaForCausalLM) -> None:
        with (
            clue_fast.patch(llama) as patched,
            patched.record("forget"),
            pytest.raises(PatchError, match="itself"),
        ):
            llama.model(TOKENS)
