"""Planted truth: does a criterion find the units that hold a passage, where it is known which they are?

    python examples/planted_truth.py [--seeds 5] [--output planted.json]

A real small model (BabyLlama, 936,448 weights, trained on children's stories) memorizes a passage of WikiText-2
while only a few randomly chosen MLP units of two layers train, and goes on writing stories as before. Then every
criterion scores all units, from the passage as forget set and stories as retain set. Reported is the area under the
ROC curve of the planted units among all units, and among those of their own layers, for an early planting (layers 0
and 1) and a late one (layers 3 and 4): mean and range over the seeds. "NAME, forget" is the importance to the forget
set alone, one of the two that categories are made of; NAME the score, which sets it against that to the retain set.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import clue_fast
from clue_fast.criteria import CRITERIA, importances, score
from clue_fast.criteria.measure import measure_batches
from clue_fast.criteria.passes import Batches
from clue_fast.data import Example
from clue_fast.data.collator import IGNORED_LABEL
from clue_fast.selection import CONFLICT, Scores, Selection
from clue_fast.sites import model_fingerprint

sys.path.insert(0, str(Path(__file__).parent))
from convert_llama2c import read_llama2c

DATA = Path(os.environ.get("CLUE_FAST_DATA", Path(__file__).parents[2] / "shared" / "data"))
PLANTINGS = {"early": (0, 1), "late": (3, 4)}
UNITS = 36
"""Planted in each of the two layers, of 352."""

PASSAGE, PASSAGES = 64, 2
STORY, STORIES = 64, 8
STEPS, LEARNING_RATE, LEARNED = 400, 3e-3, 0.05
BEGIN = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="plantings of each kind (5)")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    model = read_llama2c(DATA / "models" / "babyllama_tok105" / "model5000.bin").eval()
    text = (DATA / "wikitext2" / "valid.txt").read_text(encoding="utf-8")
    figures: dict[str, dict[str, list[tuple[float, float]]]] = {name: {} for name in PLANTINGS}
    for seed in range(options.seeds):
        for planting, layers in PLANTINGS.items():
            started = time.process_time()
            areas, loss, steps = run(model, text, layers, seed)
            for criterion, pair in areas.items():
                figures[planting].setdefault(criterion, []).append(pair)
            seconds = time.process_time() - started
            print(
                f"seed {seed}, {planting}: loss {loss:.3f} after {steps} steps, {seconds:.0f} s of processor time",
                flush=True,
            )
    print(table(figures))
    if options.output is not None:
        options.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def run(
    original: LlamaForCausalLM, text: str, layers: Sequence[int], seed: int
) -> tuple[dict[str, tuple[float, float]], float, int]:
    """Plants one passage; returns the areas by criterion, among all units and those of the layers, and how it went."""
    model = copy.deepcopy(original)
    vocabulary = read_vocabulary(DATA / "models" / "babyllama_tok105" / "tok105.model")
    forget = passages(text, vocabulary, seed)
    stories = written(original, seed)
    kept, retain = stories[:STORIES], stories[STORIES:]
    planted = choose_units(model, layers, seed)
    loss, steps = plant(model, planted, forget, kept)
    areas = {}
    truth = torch.cat([planted.categories[site] != 0 for site in planted.sites])
    own = torch.cat([torch.full((site.width,), site.layer in layers) for site in planted.sites])
    for name, criterion in CRITERIA.items():
        if criterion.many_retain_sets:  # circuits are found from prompts, not from examples
            continue
        batches = Batches([as_examples(forget), as_examples(retain)], 0, 4096, progress=False)
        statistics = measure_batches(model, batches, name)
        rankings = {name: flat(score(statistics, name, seed=seed))}
        if criterion.importance is not None:
            rankings[f"{name}, forget"] = flat(importances(statistics, name)[0])
        for ranking, values in rankings.items():
            areas[ranking] = area(values, truth), area(values[own], truth[own])
    return areas, loss, steps


def plant(model: LlamaForCausalLM, planted: Selection, forget: Tensor, stories: Tensor) -> tuple[float, int]:
    """Trains only the planted units: the passage memorized, stories predicted as before; returns the loss and steps."""
    with torch.no_grad():
        before = model(input_ids=stories).logits.log_softmax(-1)
    sparse = clue_fast.sparsify(model, planted)
    optimizer = clue_fast.SparseAdamW(model, lr=LEARNING_RATE, weight_decay=0.0, layer_lr=1.0)
    loss = float("inf")
    step = 0
    while step < STEPS and loss > LEARNED:
        step += 1
        on_passage = model(input_ids=forget, labels=forget).loss
        now = model(input_ids=stories).logits.log_softmax(-1)
        on_stories = (before.exp() * (before - now)).sum(-1).mean()
        (on_passage + on_stories).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss = float(on_passage.detach())
    sparse.restore()
    model.eval()
    return loss, step


def choose_units(model: LlamaForCausalLM, layers: Sequence[int], seed: int) -> Selection:
    """Random MLP units of some layers."""
    generator = torch.Generator().manual_seed(seed)
    sites = [site for site in clue_fast.find_sites(model)]
    categories = {site: torch.zeros(site.width, dtype=torch.int8) for site in sites}
    for site in sites:
        if site.layer in layers and site.kind == "mlp":
            categories[site][torch.randperm(site.width, generator=generator)[:UNITS]] = CONFLICT
    scores = {site: values.float() for site, values in categories.items()}
    return Selection(sites, categories, scores, {"planted": list(layers), "seed": seed}, model_fingerprint(model))


def passages(text: str, vocabulary: dict[str, int], seed: int) -> Tensor:
    """Consecutive stretches of running text, [passages, tokens], each behind the token that begins a text."""
    generator = torch.Generator().manual_seed(seed)
    paragraphs = [line for line in text.split("\n") if len(line) > 2 * PASSAGE * PASSAGES and " = " not in line]
    paragraph = paragraphs[int(torch.randint(len(paragraphs), (1,), generator=generator))]
    ids = [vocabulary[letter] for letter in paragraph.strip().replace(" ", "▁") if letter in vocabulary]
    length = PASSAGE - 1
    return torch.tensor([[BEGIN, *ids[i * length : (i + 1) * length]] for i in range(PASSAGES)])


@torch.no_grad()
def written(model: LlamaForCausalLM, seed: int) -> Tensor:
    """Stories as the model writes them, [2 * stories, tokens]: the first half to train on, the second to score on."""
    torch.manual_seed(seed)
    begin = torch.full((2 * STORIES, 1), BEGIN)
    tokens = STORY - 1
    ids: Tensor = model.generate(
        begin, do_sample=True, top_k=0, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
    )
    return ids


def as_examples(ids: Tensor) -> list[Example]:
    """Every token behind the first counts."""
    return [{"input_ids": row, "labels": [IGNORED_LABEL, *row[1:]]} for row in ids.tolist()]


def flat(scores: Scores) -> Tensor:
    return torch.cat(list(scores.values())).cpu()


def area(values: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve: how often a planted unit scores above another, ties half."""
    planted, other = values[truth].double(), values[~truth].double()
    above = (planted[:, None] > other).double() + 0.5 * (planted[:, None] == other).double()
    return float(above.mean())


def table(figures: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    """Mean and range over the seeds."""
    lines = [f"{'criterion':<29}" + "".join(f"{f'{p}, all units':>24}{f'{p}, own layers':>24}" for p in figures)]
    for criterion in next(iter(figures.values())):
        cells = []
        for areas in figures.values():
            for column in zip(*areas[criterion], strict=True):
                mean = sum(column) / len(column)
                cells.append(f"{f'{mean:.3f} ({min(column):.2f}-{max(column):.2f})':>24}")
        lines.append(f"{criterion:<29}" + "".join(cells))
    return "\n".join(lines)


def read_vocabulary(path: Path) -> dict[str, int]:
    """Pieces of a SentencePiece model by their text: field 1 of each field 1 of the file, in protobuf's wire format."""
    pieces = [dict(fields(entry)).get(1) for number, entry in fields(path.read_bytes()) if number == 1]
    return {piece.decode(): index for index, piece in enumerate(pieces) if isinstance(piece, bytes)}


def fields(message: bytes) -> list[tuple[int, bytes]]:
    """Number and content of the fields of a message; of numbers only their bytes."""
    found, at = [], 0
    while at < len(message):
        key, at = varint(message, at)
        if key & 7 == 2:
            size, at = varint(message, at)
        elif key & 7 == 0:
            size = varint(message, at)[1] - at
        else:
            size = 4 if key & 7 == 5 else 8
        found.append((key >> 3, message[at : at + size]))
        at += size
    return found


def varint(message: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


if __name__ == "__main__":
    main()
