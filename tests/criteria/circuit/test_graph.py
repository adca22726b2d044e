"""The graph of each family: what writers add makes up the stream, and the gradients of readers are its derivative."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, T5ForConditionalGeneration

from clue_fast.criteria.circuit.architecture import find_architecture
from clue_fast.criteria.circuit.attribution import Capture, Run, Streams
from clue_fast.criteria.circuit.graph import Graph
from clue_fast.errors import CircuitError

from .conftest import CONFIGS

TOKENS = torch.tensor([[5, 17, 3, 29, 8, 11, 40], [7, 7, 30, 4, 21, 49, 13]])
EVERY = slice(0, TOKENS.numel())


def target(logits: Tensor) -> Tensor:
    return logits[:, -1].log_softmax(-1)[:, 5].sum() + logits[:, 2, 9].sum()


def captured(model: PreTrainedModel, graph: Graph) -> Run:
    capture = Capture(model, graph.architecture)
    with capture.record():
        target(model(TOKENS).logits).backward()
    return capture.run()


@pytest.mark.parametrize("name", CONFIGS)
def test_what_writers_add_sums_to_the_stream(family: Callable[[str], PreTrainedModel], name: str) -> None:
    model = family(name)
    streams: dict[int, Tensor] = {}
    architecture = find_architecture(model)
    for index, layer in enumerate(architecture.layers):
        model.get_submodule(layer.path).register_forward_hook(
            lambda module, inputs, output, index=index: streams.__setitem__(
                index, (output[0] if isinstance(output, tuple) else output).detach().flatten(0, 1)
            )
        )
    graph = Graph(architecture)
    run = captured(model, graph)
    expander = Streams(model, graph)
    written = expander.writer_outputs(run, EVERY)
    assert len(written) == len(graph.writers) == 1 + 2 * (4 + 1)
    total = written.sum(0) + expander.constant(run, EVERY)
    assert (total - streams[1]).norm() <= 1e-6 * streams[1].norm()
    torch.testing.assert_close(run.final_read, streams[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_reader_grads_are_the_derivative(family: Callable[[str], PreTrainedModel], name: str) -> None:
    """A small change of the stream, seen by one reader alone, against the difference that it makes."""
    model = family(name).double()
    graph = Graph(find_architecture(model))
    grads = [Streams(model, graph).reader_grads(captured(model, graph), layer, EVERY) for layer in range(3)]
    rows = torch.cat(grads)
    assert len(rows) == len(graph.readers)
    torch.manual_seed(1)
    change = torch.randn(TOKENS.numel(), 32, dtype=torch.float64)
    for index, reader in enumerate(graph.readers):
        step = 2e-3
        value = {n: float(target(seen_by(model, graph, reader.name, n * step * change))) for n in (-2, -1, 1, 2)}
        expected = (8 * (value[1] - value[-1]) - (value[2] - value[-2])) / (12 * step)
        found = float((rows[index].double() * change).sum())
        assert found == pytest.approx(expected, rel=2e-3, abs=1e-3), reader.name


@torch.no_grad()
def seen_by(model: PreTrainedModel, graph: Graph, name: str, change: Tensor) -> Tensor:
    """Logits when one reader alone sees the stream changed."""
    reader = graph.readers[graph.reader_index[name]]
    change = change.reshape(*TOKENS.shape, -1)
    if reader.part == "logits":
        module = model.get_submodule(graph.architecture.final)
        handle = module.register_forward_pre_hook(lambda module, inputs: (inputs[0] + change.reshape(inputs[0].shape),))
    else:
        layer = graph.architecture.layers[reader.layer]
        norm_path = layer.mlp_norm if reader.part == "mlp" else layer.attention_norm
        norm = model.get_submodule(norm_path) if norm_path else None
        seen: dict[str, Tensor] = {}

        def changed(read: Tensor) -> Tensor:
            """What the norm makes of the changed stream."""
            if norm is None:
                return read + change.reshape(read.shape)
            return type(norm).forward(norm, seen["norm"] + change.reshape(seen["norm"].shape))

        handles = []
        if norm is not None:
            handles.append(norm.register_forward_pre_hook(lambda m, inputs: seen.__setitem__("norm", inputs[0])))
        if reader.part == "mlp":
            module = model.get_submodule(layer.mlp_input)
            handles.append(module.register_forward_pre_hook(lambda m, inputs: (changed(inputs[0]), *inputs[1:])))
        else:
            projection = getattr(layer, reader.part)
            rows = projection.rows[reader.head]

            def patched(module: torch.nn.Module, inputs: tuple, output: Tensor) -> Tensor:
                output = output.clone()
                output[..., rows] = type(module).forward(module, changed(inputs[0]))[..., rows]
                return output

            handles.append(model.get_submodule(projection.path).register_forward_hook(patched))
        logits = model(TOKENS).logits
        for each in handles:
            each.remove()
        return logits
    logits = model(TOKENS).logits
    handle.remove()
    return logits


def test_edges_lead_from_earlier_to_later(family: Callable[[str], PreTrainedModel]) -> None:
    graph = Graph(find_architecture(family("grouped")))
    edges = {(graph.writers[w].name, graph.readers[r].name) for w, r in graph.valid.nonzero().tolist()}
    assert ("embed", "a0.h3.q") in edges and ("a0.h3", "m0") in edges and ("m0", "a1.g1.v") in edges
    assert ("a0.h3", "a0.h2.q") not in edges and ("m0", "m0") not in edges and ("a1.h0", "m0") not in edges
    assert {target for source, target in edges if source == "m1"} == {"logits"}
    head = graph.writers[[writer.name for writer in graph.writers].index("a1.h2")]
    assert [graph.readers[r].name for r in graph.readers_of(head)] == ["a1.h2.q", "a1.g1.k", "a1.g1.v"]


def test_the_mlp_of_a_parallel_block_does_not_read_its_attention(family: Callable[[str], PreTrainedModel]) -> None:
    for name in ("gpt_neox", "falcon", "falcon_grouped"):
        graph = Graph(find_architecture(family(name)))
        names = [writer.name for writer in graph.writers]
        assert not bool(graph.valid[names.index("a0.h0"), graph.reader_index["m0"]])
        assert bool(graph.valid[names.index("a0.h0"), graph.reader_index["m1"]])


class OtherNames(nn.Module):
    """Attention without positions, whose projections have names that no library gives them."""

    head_dim = 8

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.ask, self.offer, self.tell, self.say = inner.q_proj, inner.k_proj, inner.v_proj, inner.o_proj

    def forward(self, hidden_states: Tensor, **unused: object) -> tuple[Tensor, None]:
        q, k, v = (
            p(hidden_states).unflatten(-1, (-1, 8)).transpose(1, 2).repeat_interleave(4 // (p.out_features // 8), 1)
            for p in (self.ask, self.offer, self.tell)
        )
        z = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.say(z.transpose(1, 2).flatten(2)), None


def test_names_of_projections_do_not_matter(family: Callable[[str], PreTrainedModel]) -> None:
    model = family("grouped")
    expected = find_architecture(model).layers
    for layer in model.model.layers:
        layer.self_attn = OtherNames(layer.self_attn)
    found = find_architecture(model).layers
    for own, other in zip(found, expected, strict=True):
        assert [own.q.path, own.k.path, own.v.path, own.output] == [
            f"{own.path}.self_attn.{name}" for name in ("ask", "offer", "tell", "say")
        ]
        assert all(torch.equal(getattr(own, p).rows, getattr(other, p).rows) for p in ("q", "k", "v"))


def test_a_model_with_an_encoder_is_refused() -> None:
    sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    with pytest.raises(CircuitError, match="an encoder and a decoder"):
        find_architecture(T5ForConditionalGeneration(T5Config(**sizes)))


def test_a_model_that_scales_its_stream_is_refused(family: Callable[[str], PreTrainedModel]) -> None:
    with pytest.raises(CircuitError, match=r"model\.layers\.0"):
        find_architecture(family("scaled"))


def test_looking_leaves_no_hooks(family: Callable[[str], PreTrainedModel]) -> None:
    model = family("gemma2")
    captured(model, Graph(find_architecture(model)))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
