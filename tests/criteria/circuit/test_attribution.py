"""Edge attribution against patching every edge, one by one, in a Llama written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from clue_fast.criteria.circuit import CorruptedExample, EdgeScores, Graph, edge_scores
from clue_fast.criteria.circuit.architecture import find_architecture
from clue_fast.errors import CircuitError, NonFiniteError

from ..conftest import counted_passes
from .conftest import IndirectObjects


class PatchedLlama:
    """Runs a Llama with each of many edges patched, side by side; every reader sees a stream of its own."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model.double()
        self.graph = Graph(find_architecture(model))
        self.edges = [tuple(edge) for edge in self.graph.valid.nonzero().tolist()]
        self.edges_into: dict[int, list[tuple[int, int]]] = {}
        for row, (writer, reader) in enumerate(self.edges):
            self.edges_into.setdefault(reader, []).append((row, writer))
        config = model.config
        self.heads, self.kv_heads, self.eps = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.rms_norm_eps,
        )
        self.size = config.hidden_size // self.heads

    def run(self, tokens: list[int], donor: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Logits of the last token, and what each writer adds; with a donor, one row for each patched edge."""
        rows = 1 if donor is None else len(self.edges)
        written = [self.model.model.embed_tokens.weight[torch.tensor(tokens)].expand(rows, -1, -1)]

        def read(name: str, norm: Tensor) -> Tensor:
            stream = sum(written).clone()
            reader = self.graph.reader_index[name]
            for row, writer in self.edges_into.get(reader, ()) if donor is not None else ():
                stream[row] += donor[writer][0] - written[writer][row]
            return stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + self.eps) * norm

        for index, layer in enumerate(self.model.model.layers):
            attention, mlp, norm = layer.self_attn, layer.mlp, layer.input_layernorm.weight
            q, k, v = (
                torch.stack(
                    [
                        read(f"a{index}.{letter}{head}.{part}", norm)
                        @ self.rows(getattr(attention, f"{part}_proj"), head)
                        for head in range(heads)
                    ],
                    dim=1,
                )
                for part, letter, heads in (
                    ("q", "h", self.heads),
                    ("k", "g", self.kv_heads),
                    ("v", "g", self.kv_heads),
                )
            )
            k, v = (x.repeat_interleave(self.heads // self.kv_heads, dim=1) for x in (self.turn(k), v))
            weights = (self.turn(q) @ k.mT) / self.size**0.5
            future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
            found = weights.masked_fill(future, -torch.inf).softmax(-1) @ v
            written += [
                found[:, head] @ attention.o_proj.weight[:, head * self.size : (head + 1) * self.size].T
                for head in range(self.heads)
            ]
            x = read(f"m{index}", layer.post_attention_layernorm.weight)
            gate = torch.nn.functional.silu(x @ mlp.gate_proj.weight.T)
            written.append((gate * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T)
        return (read("logits", self.model.model.norm.weight) @ self.model.lm_head.weight.T)[:, -1], written

    def rows(self, module: torch.nn.Linear, head: int) -> Tensor:
        return module.weight[head * self.size : (head + 1) * self.size].T

    def turn(self, x: Tensor) -> Tensor:
        """Rotary embedding."""
        frequency = 10000.0 ** (-torch.arange(0, self.size, 2, dtype=torch.float64) / self.size)
        angle = torch.outer(torch.arange(x.shape[-2], dtype=torch.float64), frequency).repeat(1, 2)
        half = torch.cat([-x[..., self.size // 2 :], x[..., : self.size // 2]], dim=-1)
        return x * angle.cos() + half * angle.sin()

    def effects(self, pairs: list[CorruptedExample]) -> EdgeScores:
        """How the mean log-odds of the answer change with each edge patched, in both directions."""
        totals = [torch.zeros(self.graph.valid.shape, dtype=torch.float64) for _ in range(2)]
        for pair in pairs:
            clean, corrupted = pair.input_ids[:-1], pair.corrupted_ids[:-1]
            answer = pair.input_ids[-1]
            clean_logits, clean_written = self.run(clean)
            corrupted_logits, corrupted_written = self.run(corrupted)
            for total, tokens, donor, base in (
                (totals[0], clean, corrupted_written, clean_logits),
                (totals[1], corrupted, clean_written, corrupted_logits),
            ):
                changes = log_odds(self.run(tokens, donor)[0], answer) - log_odds(base, answer)
                for (writer, reader), change in zip(self.edges, changes, strict=True):
                    total[writer, reader] += change / len(pairs)
        return EdgeScores(*totals)


def log_odds(logits: Tensor, answer: int) -> Tensor:
    others = torch.cat([logits[:, :answer], logits[:, answer + 1 :]], dim=1)
    return logits[:, answer] - others.logsumexp(1)


@pytest.fixture(scope="module")
def exact(indirect_objects: IndirectObjects) -> EdgeScores:
    return PatchedLlama(indirect_objects.model).effects(indirect_objects.pairs)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("direction", ["noising", "denoising"])
def test_ranks_edges_as_patching_each_does(
    indirect_objects: IndirectObjects, exact: EdgeScores, direction: str, steps: int
) -> None:
    assert indirect_objects.accuracy > 0.9
    graph = Graph(find_architecture(indirect_objects.model))
    found = edge_scores(indirect_objects.model, graph, indirect_objects.pairs, pad_token_id=0, steps=steps)
    pair = [getattr(scores, direction)[graph.valid].abs() for scores in (found, exact)]
    assert spearmanr(*pair)[0] >= 0.8


@pytest.mark.slow
def test_equals_patching_where_the_pairs_are_nearly_the_same(indirect_objects: IndirectObjects) -> None:
    """To first order both are the same: the embedding of one token moves by a thousandth of its length."""
    patched = PatchedLlama(indirect_objects.model)
    embedding = patched.model.model.embed_tokens.weight
    original = embedding.clone()
    pair = indirect_objects.pairs[0]
    unused = next(token for token in range(1, len(embedding)) if token not in pair.input_ids + pair.corrupted_ids)
    position = 4
    token = pair.input_ids[position]
    try:
        embedding[unused] = embedding[token] + 1e-3 * (embedding[pair.corrupted_ids[-2]] - embedding[token])
        near = CorruptedExample(
            pair.input_ids, [*pair.input_ids[:position], unused, *pair.input_ids[position + 1 :]], pair.labels
        )
        expected = patched.effects([near])
        for steps in (0, 2):
            found = edge_scores(patched.model, patched.graph, [near], pad_token_id=0, steps=steps)
            for direction in ("noising", "denoising"):
                ours, theirs = getattr(found, direction), getattr(expected, direction)
                assert (ours - theirs).norm() <= 2e-2 * theirs.norm()
    finally:
        embedding.copy_(original)


PAIRS = [
    CorruptedExample([3, 9, 4, 22, 8], [3, 9, 17, 22, 8], [-100, -100, -100, -100, 8]),
    CorruptedExample([5, 6, 7, 8, 9, 10, 11], [5, 6, 30, 31, 9, 10, 11], [-100, -100, -100, -100, -100, 10, 11]),
    CorruptedExample([40, 41, 9], [44, 41, 9], [-100, -100, 9]),
]


@pytest.mark.parametrize("name", ["llama", "falcon", "gemma2", "olmo2"])
def test_neither_batches_nor_chunks_matter(family: Callable[[str], PreTrainedModel], name: str) -> None:
    model = family(name)
    graph = Graph(find_architecture(model))
    found = [
        edge_scores(model, graph, PAIRS, pad_token_id=0, steps=1, tokens_per_batch=tokens, chunk_bytes=chunk)
        for tokens, chunk in ((1000, 2**26), (1, 2**26), (1000, 1))
    ]
    for other in found[1:]:
        for direction in ("noising", "denoising"):
            ours, theirs = getattr(found[0], direction), getattr(other, direction)
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_cost_in_passes(family: Callable[[str], PreTrainedModel]) -> None:
    model = family("llama")
    graph = Graph(find_architecture(model))
    for steps, forward, backward in ((0, 2, 2), (2, 6, 4)):
        with counted_passes(model) as passes:
            edge_scores(model, graph, PAIRS, pad_token_id=0, steps=steps)
        assert (passes.forward / len(PAIRS), passes.backward / len(PAIRS)) == (forward, backward)


def test_noising_is_denoising_of_the_swapped_pairs(family: Callable[[str], PreTrainedModel]) -> None:
    model = family("llama")
    graph = Graph(find_architecture(model))
    swapped = [CorruptedExample(pair.corrupted_ids, pair.input_ids, pair.labels) for pair in PAIRS]
    there = edge_scores(model, graph, PAIRS, pad_token_id=0, steps=2, target="loss")
    back = edge_scores(model, graph, swapped, pad_token_id=0, steps=2, target="loss")
    torch.testing.assert_close(there.noising, back.denoising, rtol=1e-3, atol=1e-6)


def test_no_records(family: Callable[[str], PreTrainedModel]) -> None:
    model = family("llama")
    with pytest.raises(CircuitError, match="at least one record"):
        edge_scores(model, Graph(find_architecture(model)), [], pad_token_id=0)


def test_nan_weights(family: Callable[[str], PreTrainedModel]) -> None:
    model = family("llama")
    graph = Graph(find_architecture(model))
    model.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(NonFiniteError, match="an edge"):
        edge_scores(model, graph, PAIRS, pad_token_id=0)
