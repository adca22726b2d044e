"""Recording works however a model is run: compiled, under autocast, offloaded, wrapped, trained, shared out."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import clue_fast
from clue_fast.errors import PatchError
from clue_fast.selection import CONFLICT, Selection
from clue_fast.sites import find_sites, model_fingerprint
from tests.models.families import SIZES, make_batch, make_model
from tests.models.test_families import assert_same, cast, compiled_batch, record, trace

KINDS = ("mlp", "expert", "attention")
SOME = ["llama", "phi3", "gpt2", "mixtral", "t5 gated"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


class TestCompile:
    @pytest.mark.parametrize(
        "name", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gpt2", "mixtral"))]
    )
    def test_gradients_and_groups(self, name: str) -> None:
        """Through AOTAutograd, which splits forward and backward, with groups of the batch and heads."""
        model, batch = make_model(name), compiled_batch(name)
        group = torch.randint(0, 3, batch["input_ids"].shape, dtype=torch.int8)

        def run(forward: Any) -> clue_fast.Statistics:
            with clue_fast.patch(model, kinds=KINDS) as patched:
                with patched.record("forget", gradients=True):
                    forward(model)(**batch, token_group=group).logits.square().mean().backward()
                return patched.statistics

        eager = run(lambda model: model)
        assert_same(run(lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")), eager)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["llama", "mixtral"])
    def test_inductor(self, name: str) -> None:
        model, batch = make_model(name), compiled_batch(name)
        with torch.no_grad():
            eager = record(model, batch)
            with clue_fast.patch(model) as patched:
                with patched.record("forget"):
                    torch.compile(model, fullgraph=True)(**batch)
                assert_same(patched.statistics, eager)

    def test_recording_may_begin_after_compiling(self) -> None:
        model, batch = make_model("llama"), compiled_batch("llama")
        with torch.no_grad():
            eager = record(model, batch)
            compiled = torch.compile(model, fullgraph=True, backend="eager")
            compiled(**batch)
            with clue_fast.patch(compiled) as patched:
                compiled(**batch)
                for _ in range(2):
                    with patched.record("forget"):
                        compiled(**batch)
                assert torch.equal(patched.statistics.count, 2 * eager.count)
            compiled(**batch)
            assert torch.equal(patched.statistics.count, 2 * eager.count)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_checkpointed_layers_compiled_one_by_one(self, reentrant: bool) -> None:
        batch, runs = make_batch("llama"), []
        for compiling in (False, True):
            model = make_model("llama").train()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
            if compiling:
                for layer in model.model.layers:
                    layer.mlp.compile(fullgraph=True, backend="aot_eager")
            runs.append(record(model, batch, gradients=True))
        assert_same(*runs)

    @pytest.mark.slow
    def test_checkpointed_as_a_whole(self) -> None:
        model, batch = make_model("llama").train(), compiled_batch("llama")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.config.use_cache = False

        def run(forward: Any) -> clue_fast.Statistics:
            with clue_fast.patch(model, kinds=KINDS) as patched:
                with patched.record("forget", gradients=True):
                    forward(**batch).logits.square().mean().backward()
                return patched.statistics

        eager = run(model)
        assert_same(run(torch.compile(model, fullgraph=True, backend="aot_eager")), eager)

    def test_a_group_that_there_is_not(self) -> None:
        """Compiled code cannot look at values; the end of the recording does."""
        model, batch = make_model("llama"), compiled_batch("llama")
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with clue_fast.patch(model) as patched, torch.no_grad():
            with pytest.raises(PatchError, match=r"1 times a group outside 0\.\.2"), patched.record("forget"):
                compiled(**batch, token_group=torch.tensor([1, 2, 9]))
            with patched.record("forget"):
                compiled(**batch)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(name: str, dtype: torch.dtype) -> None:
    """Outputs are as far from float64 as those of the stock model under autocast; what it sees is recorded."""
    model, batch = make_model(name), make_batch(name)
    wide = make_model(name, torch.float64)
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        exact = wide(**cast(batch, torch.float64)).logits
        with torch.autocast("cpu", dtype):
            stock = model(**batch).logits.double()
        with clue_fast.patch(model, kinds=KINDS) as patched, patched.record("forget"), torch.autocast("cpu", dtype):
            found = model(**batch).logits.double()
        statistics = record(model, batch, kinds=KINDS)
    assert (found - exact).norm() <= 2 * (stock - exact).norm()
    assert (
        torch.equal(patched.statistics.count, statistics.count) or name == "mixtral"
    )  # routing is a matter of rounding
    site = next(site for site in patched.sites if site.kind == "attention_head" or site.structure != "experts")
    near = patched.statistics.of(site, "forget").abs_mean
    torch.testing.assert_close(near, statistics.of(site, "forget").abs_mean, rtol=0.1, atol=0.02)


@pytest.mark.parametrize("name", SOME)
def test_half_precision(name: str) -> None:
    model, batch = make_model(name, torch.float16), cast(make_batch(name), torch.float16)
    wide = make_model(name, torch.float64)
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        exact, stock = wide(**cast(batch, torch.float64)).logits, model(**batch).logits.double()
        with clue_fast.patch(model, kinds=KINDS) as patched, patched.record("forget"):
            found = model(**batch).logits.double()
    assert (found - exact).norm() <= 2 * (stock - exact).norm()


class TestAccelerate:
    @pytest.mark.parametrize("name", SOME)
    @pytest.mark.parametrize("where", ["cpu_offload", "disk_offload"])
    def test_offloaded(self, name: str, where: str, tmp_path: Path) -> None:
        """Weights are on the meta device until a module runs; sites are found and recorded all the same."""
        accelerate = pytest.importorskip("accelerate")
        model, batch = make_model(name), make_batch(name)
        expected = record(copy.deepcopy(model), batch)
        folder = (tmp_path,) if where == "disk_offload" else ()
        getattr(accelerate, where)(model, *folder, execution_device="cpu", offload_buffers=False)
        before = trace(model)
        with torch.no_grad():
            stock = model(**batch).logits
        assert_same(record(model, batch), expected)
        assert trace(model) == before
        with torch.no_grad():
            assert torch.equal(model(**batch).logits, stock)

    @pytest.mark.gpu
    def test_layers_on_different_devices(self) -> None:
        """Each device has accumulators of its own, which are added up at the end."""
        accelerate = pytest.importorskip("accelerate")
        model, batch = make_model("llama"), make_batch("llama")
        expected = record(copy.deepcopy(model), batch, kinds=KINDS, gradients=True)
        places = {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": 0,
            "model.norm": 0,
            "lm_head": 0,
        }
        accelerate.dispatch_model(model, {**places, "model.rotary_emb": 0}, main_device=0)
        assert_same(record(model, batch, kinds=KINDS, gradients=True), expected)

    @pytest.mark.parametrize("name", SOME)
    def test_hooks_on_the_patched_modules_themselves(self, name: str) -> None:
        """A device_map that names them puts hooks there; they still run, around the recorded forward."""
        hooks = pytest.importorskip("accelerate.hooks")
        model, batch = make_model(name), make_batch(name)
        expected, calls = record(model, batch), []

        class Count(hooks.ModelHook):
            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                calls.append(type(module).__name__)
                return args, kwargs

        paths = {site.path for site in find_sites(model)}
        for path in paths:
            hooks.add_hook_to_module(model.get_submodule(path), Count())
        before = trace(model)
        assert_same(record(model, batch), expected)
        assert len(calls) >= len(paths)
        assert trace(model) == before


class TestPeft:
    def wrapped(self, name: str) -> tuple[nn.Module, nn.Module]:
        peft = pytest.importorskip("peft")
        model = make_model(name)
        targets = {"llama": ["gate_proj", "down_proj", "o_proj"], "gpt2": ["c_fc", "c_proj"]}[name]
        config = peft.LoraConfig(target_modules=targets, r=4, init_lora_weights=False, fan_in_fan_out=name == "gpt2")
        return model, peft.get_peft_model(model, config).eval()

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_activations_are_those_of_the_adapted_model(self, name: str) -> None:
        _, adapted = self.wrapped(name)
        batch = make_batch(name)
        merged = copy.deepcopy(adapted).merge_and_unload()
        before = trace(adapted)
        found = record(adapted, batch, kinds=KINDS)
        expected = record(merged, batch, kinds=KINDS)
        assert found.count.tolist() == expected.count.tolist()
        scale = expected.values.abs().amax(-1, keepdim=True)
        assert bool(((found.values - expected.values).abs() <= 1e-4 * scale).all())
        assert trace(adapted) == before

    def test_parts_are_those_of_the_weights_below_the_adapter(self) -> None:
        _, adapted = self.wrapped("llama")
        names = dict(adapted.named_parameters())
        for site in find_sites(adapted, KINDS):
            assert all(part.parameter in names for part in site.slices)
        assert any("base_layer" in part.parameter for site in find_sites(adapted) for part in site.slices)

    def test_generation(self) -> None:
        _, adapted = self.wrapped("llama")
        with clue_fast.patch(adapted) as patched, patched.record("forget"):
            adapted.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        assert int(patched.statistics.count[0, 0]) == 3 + 3

    def test_wrapping_after_patching(self) -> None:
        peft = pytest.importorskip("peft")
        model, batch = make_model("llama"), make_batch("llama")
        expected = record(model, batch)
        patched = clue_fast.patch(model)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up_proj", "down_proj"], r=4)).eval()
        with patched.record("forget"), torch.no_grad():
            adapted(**batch)
        assert_same(patched.statistics, expected)
        clue_fast.unpatch(adapted)


class TestQuantized:
    @pytest.mark.parametrize("bits", [8, 4])
    @pytest.mark.parametrize("config", ["LlamaConfig", "OPTConfig"])
    def test_linear_layers_of_few_bits(self, config: str, bits: int) -> None:
        """Their weights are packed, their activations are not; what is recorded is what the layers are given."""
        bnb = pytest.importorskip("bitsandbytes")
        sizes = SIZES | {"hidden_size": 64, "intermediate_size": 128, "ffn_dim": 128, "word_embed_proj_dim": 64}
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes)).eval()
        for path, linear in list(model.named_modules()):
            if isinstance(linear, nn.Linear) and "layers" in path:
                model.set_submodule(path, quantized(bnb, linear, bits))
        batch, seen = make_batch("llama"), {}
        with torch.no_grad():
            model(**batch)  # packs the weights anew
            stock = model(**batch).logits
            with clue_fast.patch(model, kinds=KINDS) as patched, patched.record("forget"):
                found = model(**batch).logits
            sites = [site for site in patched.sites if site.kind == "mlp"]
            for site in sites:
                model.get_submodule(site.output).register_forward_pre_hook(
                    lambda _, args, site=site: seen.__setitem__(site, args[0].flatten(0, -2))
                )
            model(**batch)
        torch.testing.assert_close(found, stock, rtol=1e-3, atol=1e-3)
        assert len(sites) == 2
        for site in sites:
            predicting = torch.zeros_like(batch["labels"], dtype=torch.bool)
            predicting[:, :-1] = batch["labels"][:, 1:] != -100
            kept = seen[site].double()[predicting.flatten()]
            mean = patched.statistics.of(site, "forget").mean
            torch.testing.assert_close(mean, kept.mean(0), rtol=1e-3, atol=1e-4)


def quantized(bnb: Any, linear: nn.Linear, bits: int) -> nn.Module:
    shape = linear.in_features, linear.out_features, linear.bias is not None
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(*shape, compute_dtype=torch.float32)
        layer.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
    layer.bias = linear.bias
    return layer.to("cpu").eval()


class TestSparseTraining:
    def selection(self, model: nn.Module) -> Selection:
        sites = find_sites(model)
        categories = {site: torch.zeros(site.width, dtype=torch.int8) for site in sites}
        for site in sites:
            categories[site][::5] = CONFLICT
        scores = {site: torch.zeros(site.width) for site in sites}
        return Selection(sites, categories, scores, {}, model_fingerprint(model))

    @pytest.mark.parametrize("first", ["sparsify", "patch"])
    @pytest.mark.parametrize("last", ["restore", "unpatch"])
    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_together(self, name: str, first: str, last: str) -> None:
        model, batch = make_model(name), make_batch(name)
        expected, selection, before = record(model, batch, gradients=True), self.selection(model), trace(model)
        if first == "sparsify":
            sparse = clue_fast.sparsify(model, selection)
            patched = clue_fast.patch(model)
        else:
            patched = clue_fast.patch(model)
            sparse = clue_fast.sparsify(model, selection)
        with patched.record("forget", gradients=True):
            model(**batch).loss.backward()
        assert_same(patched.statistics, expected)
        assert all(parameter.grad is not None for parameter in sparse.trainable_parameters)
        for undo in (patched.unpatch, sparse.restore) if last == "restore" else (sparse.restore, patched.unpatch):
            undo()
        assert trace(model) == before

    @pytest.mark.parametrize("last", ["restore", "unpatch"])
    def test_experts_that_train_in_parts(self, last: str) -> None:
        """Their activations are recorded in training as outside of it, and their parts get their gradients."""
        model, batch = make_model("mixtral"), make_batch("mixtral")
        expected, selection, before = record(model, batch), self.selection(model), trace(model)
        sparse = clue_fast.sparsify(model, selection)
        model(**batch).loss.backward()
        gradients = [parameter.grad.clone() for parameter in sparse.trainable_parameters]
        sparse.model.zero_grad()
        patched = clue_fast.patch(model)
        with patched.record("forget"):
            model(**batch).loss.backward()
        assert_same(patched.statistics, expected)
        for parameter, gradient in zip(sparse.trainable_parameters, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        with patched.record("forget", gradients=True), pytest.raises(PatchError, match="trains in parts"):
            model(**batch)
        for undo in (patched.unpatch, sparse.restore) if last == "restore" else (sparse.restore, patched.unpatch):
            undo()
        assert trace(model) == before

    def test_experts_made_to_train_in_parts_while_patched(self) -> None:
        model, batch = make_model("mixtral"), make_batch("mixtral")
        before = trace(model)
        patched = clue_fast.patch(model)
        sparse = clue_fast.sparsify(model, self.selection(model))
        with patched.record("forget"), pytest.raises(PatchError, match="patch again after what changed it"):
            model(**batch)
        sparse.restore()
        with patched.record("forget"):
            model(**batch)
        assert int(patched.statistics.count.sum()) > 0
        patched.unpatch()
        assert trace(model) == before


class TestCheckpointing:
    def model(self, reentrant: bool) -> Any:
        model = make_model("llama").train()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_several_passes_before_backward(self, reentrant: bool) -> None:
        """The second run of a layer does not say which pass it is of: refused where that matters."""
        model, batch = self.model(reentrant), make_batch("llama")
        with clue_fast.patch(model) as patched, patched.record("forget", gradients=True):
            sum(model(**batch).loss for _ in range(2)).backward()
            sum(model(**batch, token_group=torch.tensor([1, 2, 1])).loss for _ in range(2)).backward()
            total = sum(model(**batch, token_group=torch.tensor(group)).loss for group in ([1, 2, 2], [2, 2, 1]))
            with pytest.raises(PatchError, match="backward after each forward pass"):
                total.backward()
        assert patched.statistics.count[:, 0].sum() > 0

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_groups_are_those_of_the_pass(self, reentrant: bool) -> None:
        """Each backward runs before the next forward, as in training: each batch keeps its groups."""
        found = []
        for model in (make_model("llama").train(), self.model(reentrant)):
            with clue_fast.patch(model) as patched, patched.record("forget", gradients=True):
                for group in ([1, 2, 2], [2, 0, 1]):
                    model(**make_batch("llama"), token_group=torch.tensor(group)).loss.backward()
            found.append(patched.statistics)
        assert_same(*found)


class TestOtherForwards:
    def test_a_forward_set_on_the_instance(self) -> None:
        """As Liger and hub kernels do: it is put aside, and comes back."""
        model, batch = make_model("llama"), make_batch("llama")
        expected = record(model, batch)
        for layer in model.model.layers:
            mlp = layer.mlp
            mlp.forward = types.MethodType(lambda self, x: type(self).forward(self, x), mlp)
        before, kept = trace(model), model.model.layers[0].mlp.__dict__["forward"]
        assert_same(record(model, batch), expected)
        assert trace(model) == before
        assert model.model.layers[0].mlp.__dict__["forward"] is kept

    def test_unpatching_what_was_wrapped_since(self) -> None:
        model, batch = make_model("llama"), make_batch("llama")
        patched = clue_fast.patch(model)
        mlp = model.model.layers[1].mlp
        swapped = type(mlp)
        mlp.__class__ = type("Wrapped", (swapped,), {})
        with pytest.raises(PatchError, match=r"model\.layers\.1\.mlp is a Wrapped now and was a FusedLlamaMLP"):
            patched.unpatch()
        with patched.record("forget"):
            model(**batch)
        mlp.__class__ = swapped
        mlp.forward = types.MethodType(swapped.forward, mlp)
        with pytest.raises(PatchError, match=r"the forward of model\.layers\.1\.mlp was replaced"):
            patched.unpatch()
        del mlp.__dict__["forward"]
        patched.unpatch()

    def test_moved_and_cast_while_patched(self) -> None:
        model, batch = make_model("llama"), make_batch("llama")
        before = trace(model)
        patched = clue_fast.patch(model)
        model.to(torch.bfloat16)
        with patched.record("forget"):
            model(**batch)
        patched.unpatch()
        assert trace(model) == before

    def test_patched_through_a_wrapper_and_below_it(self) -> None:
        model = make_model("llama")
        compiled = torch.compile(model, backend="eager")
        clue_fast.patch(compiled)
        with pytest.raises(PatchError, match="patched already"):
            clue_fast.patch(model)
        clue_fast.unpatch(model)


@pytest.mark.parametrize("name", ["gpt2", "gpt_oss", "t5 gated"])
def test_copies_and_checkpoints(name: str, tmp_path: Path) -> None:
    """A deep copy records for itself, and a checkpoint saved while patched is a plain one."""
    model, batch = make_model(name), make_batch(name)
    expected = record(model, batch, kinds=KINDS)
    patched = clue_fast.patch(model, kinds=KINDS)
    twin = copy.deepcopy(model)
    model.save_pretrained(tmp_path)
    with patched.record("forget"):
        model(**batch)
        twin(**batch)
    assert_same(patched.statistics, expected)
    clue_fast.unpatch(twin)
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(tmp_path)(**batch).logits, twin(**batch).logits)


def test_replicas_of_data_parallel_are_refused_by_name() -> None:
    model = make_model("llama")
    with clue_fast.patch(model) as patched, patched.record("forget"):
        model._is_replica = True
        with pytest.raises(PatchError, match="DistributedDataParallel"):
            model(**make_batch("llama"))
        del model._is_replica


def test_inference_mode() -> None:
    model, batch = make_model("phi3"), make_batch("phi3")
    expected = record(model, batch, kinds=KINDS)
    with torch.inference_mode():
        assert_same(record(model, batch, kinds=KINDS), expected)


def test_a_tensor_spread_over_devices_is_refused_by_name() -> None:
    class Spread(torch.Tensor):
        def full_tensor(self) -> Tensor:
            raise NotImplementedError

    model = make_model("llama")
    with clue_fast.patch(model):
        spread = model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *args: args[2].as_subclass(Spread))
        with pytest.raises(PatchError, match=r"model\.layers\.0\.mlp computes on a Spread"):
            model(**make_batch("llama"))
        spread.remove()


def test_channels_that_are_missing_are_refused_by_name() -> None:
    """As where tensor parallelism hands each rank some of the channels."""
    model = make_model("gpt2")
    mlp = model.transformer.h[0].mlp
    half = mlp.c_fc.register_forward_hook(lambda *args: args[2][..., ::2])
    with clue_fast.patch(model) as patched, patched.record("forget"):
        with pytest.raises(PatchError, match=r"h\.0\.mlp has 48 units of 1 channels, but its activations have 24"):
            model(**make_batch("gpt2"))
        half.remove()
        model(**make_batch("gpt2"))
