"""Which tokens count, and into which group: masks, labels, token_group, towers, generation."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import clue_fast
from clue_fast.errors import PatchError, UnknownNameError
from clue_fast.recording.patched import CACHES
from tests.models.families import IMAGE, make_batch, make_model

IDS = torch.arange(3, 31).reshape(4, 7)
MASK = torch.ones_like(IDS)
MASK[0, 5:] = 0
LABELS = torch.where(MASK == 1, IDS, -100)
LABELS[:, :2] = -100
QUESTIONS = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS[:, 2:].contiguous()}


def counted(model: nn.Module, batch: dict[str, Tensor], tower: str = "", **how: Any) -> list[int]:
    """Tokens of groups 1 and 2 at the first site of a tower."""
    with clue_fast.patch(model) as patched, torch.no_grad():
        patched.statistics.group_index("retain")
        with patched.record("forget", **how):
            model(**batch)
        number = next(i for i, site in enumerate(patched.sites) if tower in site.path)
        return patched.statistics.count[:2, number].tolist()


@pytest.fixture(scope="module")
def causal() -> Any:
    return make_model("llama")


@pytest.fixture(scope="module")
def seq2seq() -> Any:
    return make_model("t5")


class TestOneTower:
    def test_everything_without_a_mask(self, causal: Any) -> None:
        assert counted(causal, {"input_ids": IDS}) == [28, 0]

    def test_padding_is_left_out(self, causal: Any) -> None:
        assert counted(causal, {"input_ids": IDS, "attention_mask": MASK}) == [26, 0]

    def test_a_mask_by_position(self, causal: Any) -> None:
        with clue_fast.patch(causal) as patched, patched.record("forget"), torch.no_grad():
            causal(IDS, MASK)
        assert int(patched.statistics.count[0, 0]) == 26

    def test_labels_leave_out_what_is_no_answer(self, causal: Any) -> None:
        batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
        assert counted(causal, batch) == [18, 0]
        assert counted(causal, batch, tokens="answers") == [18, 0]
        assert counted(causal, batch, tokens="attended") == [26, 0]

    def test_a_group_for_every_row(self, causal: Any) -> None:
        batch = {"input_ids": IDS, "attention_mask": MASK, "token_group": torch.tensor([1, 2, 0, 2])}
        assert counted(causal, batch) == [5, 14]
        assert counted(causal, batch | {"labels": LABELS}) == [3, 10]

    def test_a_group_for_every_token_is_all_that_counts(self, causal: Any) -> None:
        group = torch.zeros_like(IDS)
        group[0, 6], group[1:, 4:] = 1, 2
        assert counted(causal, {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "token_group": group}) == [
            1,
            9,
        ]

    def test_embeddings_instead_of_ids(self, causal: Any) -> None:
        embeddings = causal.get_input_embeddings()(IDS)
        assert counted(causal, {"inputs_embeds": embeddings, "attention_mask": MASK}) == [26, 0]

    def test_a_mask_of_pairs_is_refused_unless_labels_tell(self, causal: Any) -> None:
        pairs = torch.zeros(4, 1, 7, 7)
        with pytest.raises(PatchError, match=r"attention_mask as \[batch, tokens\].*\(4, 1, 7, 7\)"):
            counted(causal, {"input_ids": IDS, "attention_mask": pairs})
        assert counted(causal, {"input_ids": IDS, "attention_mask": pairs, "labels": LABELS}) == [18, 0]

    def test_answers_without_labels(self, causal: Any) -> None:
        with pytest.raises(PatchError, match="no labels"):
            counted(causal, {"input_ids": IDS}, tokens="answers")

    def test_an_unknown_choice(self, causal: Any) -> None:
        with pytest.raises(UnknownNameError, match="questions"):
            counted(causal, {"input_ids": IDS}, tokens="questions")

    def test_rows_that_do_not_fit(self, causal: Any) -> None:
        with pytest.raises(PatchError, match="3 rows, the text has 4"):
            counted(causal, {"input_ids": IDS, "token_group": torch.tensor([1, 2, 1])})

    def test_a_group_that_there_is_not(self, causal: Any) -> None:
        with pytest.raises(PatchError, match=r"1\.\.3, the recorded groups are 0\.\.2"):
            counted(causal, {"input_ids": IDS, "token_group": torch.tensor([1, 2, 1, 3])})


def mean_at(model: nn.Module, batch: dict[str, Tensor], places: list[tuple[int, int]], tower: str) -> Tensor:
    """Mean of what the last site of a tower of the stock model gives at (row, position)."""
    kept: list[Tensor] = []
    site = [site for site in clue_fast.find_sites(model) if tower in site.path][-1]
    handle = model.get_submodule(site.output).register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        model(**{name: value for name, value in batch.items() if "token_group" not in name})
    handle.remove()
    return torch.stack([kept[0].double()[place] for place in places]).mean(0)


def assert_counts(model: nn.Module, batch: dict[str, Tensor], *places: list[tuple[int, int]], tower: str = "") -> None:
    """These (row, position) count for the group forget, and for retain if there are more."""
    with clue_fast.patch(model) as patched, torch.no_grad():
        with patched.record("forget"):
            model(**batch)
        site = [site for site in patched.sites if tower in site.path][-1]
        assert patched.statistics.count[:, patched.statistics.number(site)].tolist() == [*map(len, places), 0][:2]
        found = [patched.statistics.of(site, group).mean for group in ("forget", "retain")[: len(places)]]
    for mean, own in zip(found, places, strict=True):
        expected = mean_at(model, batch, own, tower)
        assert float((mean - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


class TestPositions:
    """Which positions count when a batch has labels: those that predict them."""

    def test_the_last_token_of_the_prompt_predicts_the_first_of_the_answer(self, causal: Any) -> None:
        batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
        assert_counts(causal, batch, [(0, i) for i in (1, 2, 3)] + [(row, i) for row in (1, 2, 3) for i in range(1, 6)])

    def test_an_answer_of_one_token(self, causal: Any) -> None:
        labels = torch.full_like(IDS, -100)
        labels[2, 4] = 9
        assert_counts(causal, {"input_ids": IDS, "labels": labels}, [(2, 3)])

    def test_nothing_predicts_the_first_token(self, causal: Any) -> None:
        assert_counts(causal, {"input_ids": IDS, "labels": IDS}, [(row, i) for row in range(4) for i in range(6)])

    def test_padding_on_the_left_predicts_nothing(self, causal: Any) -> None:
        mask = MASK.flip(1)
        batch = {"input_ids": IDS, "attention_mask": mask, "labels": torch.where(mask == 1, IDS, -100)}
        places = [(0, i) for i in range(2, 6)] + [(row, i) for row in (1, 2, 3) for i in range(6)]
        assert_counts(causal, batch, places)

    def test_packed_records_end_without_predicting_the_next(self, causal: Any) -> None:
        """Records of 3, 1 and 3 tokens in one row, with the labels of a flattening collator."""
        ids = IDS[:1]
        labels = ids.clone()
        labels[0, [0, 3, 4]] = -100
        batch = {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 0, 0, 1, 2]]), "labels": labels}
        assert_counts(causal, batch, [(0, 0), (0, 1), (0, 4), (0, 5)])

    def test_tokens_behind_a_cache(self, causal: Any) -> None:
        """The mask spans the cache as well; the first of the new tokens was predicted in the pass before."""
        with torch.no_grad():
            name = next(name for name in CACHES if name in inspect.signature(causal.forward).parameters)
            cache = {name: causal(IDS[:, :3], use_cache=True).past_key_values}
            with clue_fast.patch(causal) as patched, patched.record("forget"):
                causal(IDS[:, 3:], attention_mask=torch.ones_like(IDS), labels=IDS[:, 3:], **cache)
        assert int(patched.statistics.count[0, 0]) == 4 * 3

    def test_rows_of_a_mixed_batch(self, causal: Any) -> None:
        batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "token_group": torch.tensor([1, 2, 0, 2])}
        assert_counts(causal, batch, [(0, i) for i in (1, 2, 3)], [(row, i) for row in (1, 3) for i in range(1, 6)])

    def test_a_group_for_every_token_is_taken_as_it_is(self, causal: Any) -> None:
        group = torch.zeros_like(IDS)
        group[0, 0], group[1, 4], group[3, 6] = 1, 2, 1
        assert_counts(causal, {"input_ids": IDS, "labels": LABELS, "token_group": group}, [(0, 0), (3, 6)], [(1, 4)])

    def test_a_decoder_predicts_labels_at_their_own_position(self, seq2seq: Any) -> None:
        labels = QUESTIONS["labels"].clone()
        labels[1, 0] = labels[2, 2] = -100
        places = [(row, i) for row, i in torch.nonzero(labels != -100).tolist()]
        assert_counts(seq2seq, QUESTIONS | {"labels": labels}, places, tower="decoder")

    def test_a_masked_model_predicts_labels_at_their_own_position(self) -> None:
        labels = torch.full_like(IDS, -100)
        labels[0, 0] = labels[1, 3] = labels[3, 6] = 9
        batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
        assert_counts(make_model("bert"), batch, [(0, 0), (1, 3), (3, 6)])

    @pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
    def test_the_last_piece_of_an_image_predicts_the_text_behind_it(self, name: str) -> None:
        places = [(row, i) for row in (1, 2) for i in (4, 5)]
        assert_counts(make_model(name), make_batch(name), places, tower="language_model")

    def test_layers_without_a_head_predict_nothing_that_is_known(self, causal: Any) -> None:
        layers = causal.model
        with pytest.raises(PatchError, match=r"no head that is known.*pass token_group"):
            counted(layers, {"input_ids": IDS, "labels": LABELS})
        assert counted(layers, {"input_ids": IDS, "labels": LABELS}, tokens="attended") == [28, 0]
        assert counted(layers, {"input_ids": IDS, "attention_mask": MASK}) == [26, 0]


class TestEncoderAndDecoder:
    def test_each_has_its_own_tokens(self, seq2seq: Any) -> None:
        assert counted(seq2seq, QUESTIONS, "encoder") == [26, 0]
        assert counted(seq2seq, QUESTIONS, "decoder") == [18, 0]

    def test_the_masks_are_not_mixed_up_where_lengths_agree(self, seq2seq: Any) -> None:
        batch = QUESTIONS | {"labels": LABELS}
        assert counted(seq2seq, batch, "encoder") == [26, 0]
        assert counted(seq2seq, batch, "decoder") == [18, 0]

    def test_a_mask_of_the_decoder(self, seq2seq: Any) -> None:
        inputs = {"decoder_input_ids": IDS[:, :5], "decoder_attention_mask": MASK[:, 2:]}
        batch = {"input_ids": IDS, "attention_mask": MASK} | inputs
        assert counted(seq2seq, batch, "decoder") == [18, 0]

    def test_rows_have_a_group_in_both(self, seq2seq: Any) -> None:
        batch = QUESTIONS | {"token_group": torch.tensor([1, 2, 0, 2])}
        assert counted(seq2seq, batch, "encoder") == [5, 14]
        assert counted(seq2seq, batch, "decoder") == [3, 10]

    def test_the_decoder_follows_the_rows_of_the_encoder(self, seq2seq: Any) -> None:
        group = torch.zeros_like(IDS)
        group[0, :2], group[3, 3:] = 1, 2
        batch = QUESTIONS | {"token_group": group}
        assert counted(seq2seq, batch, "encoder") == [2, 4]
        assert counted(seq2seq, batch, "decoder") == [3, 5]
        own = torch.zeros(4, 5, dtype=torch.int8)
        own[2] = 2
        assert counted(seq2seq, batch | {"decoder_token_group": own}, "decoder") == [0, 5]

    def test_a_row_of_several_groups_is_refused(self, seq2seq: Any) -> None:
        group = torch.ones_like(IDS)
        group[1, 3] = 2
        with pytest.raises(PatchError, match="row 1 of token_group holds several groups"):
            counted(seq2seq, QUESTIONS | {"token_group": group})

    @pytest.mark.parametrize("cache", [True, False])
    def test_generation_counts_each_token_once(self, seq2seq: Any, cache: bool) -> None:
        with clue_fast.patch(seq2seq) as patched, patched.record("forget"):
            seq2seq.generate(IDS, attention_mask=MASK, max_new_tokens=4, min_new_tokens=4, use_cache=cache)
        counts = dict(
            zip((site.path.split(".")[0] for site in patched.sites), patched.statistics.count[0], strict=True)
        )
        assert int(counts["encoder"]) == 26
        assert int(counts["decoder"]) == 4 * 4  # the start token, and all written but the last, which is never read


class TestGeneration:
    @pytest.mark.parametrize("cache", [True, False])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_each_token_counts_once(self, causal: Any, cache: bool, side: str) -> None:
        mask = MASK.flip(1) if side == "left" else MASK
        with clue_fast.patch(causal) as patched, patched.record("forget"):
            causal.generate(
                IDS, attention_mask=mask, max_new_tokens=5, min_new_tokens=5, use_cache=cache, do_sample=False
            )
        assert int(patched.statistics.count[0, 0]) == 26 + 4 * 4

    def test_the_same_tokens_with_and_without_a_cache(self, causal: Any) -> None:
        found = []
        for cache in (True, False):
            with clue_fast.patch(causal) as patched, patched.record("forget"):
                causal.generate(IDS, max_new_tokens=5, min_new_tokens=5, use_cache=cache, do_sample=False)
            found.append(patched.statistics.values)
        scale = found[0].abs().amax(-1, keepdim=True)
        assert bool(((found[0] - found[1]).abs() <= 1e-5 * scale).all())

    def test_generate_is_that_of_the_class_again(self, causal: Any) -> None:
        with clue_fast.patch(causal):
            assert "generate" in causal.__dict__
        assert "generate" not in causal.__dict__

    def test_a_generate_of_the_instance_is_called_and_comes_back(self, causal: Any) -> None:
        own = causal.__dict__["generate"] = lambda ids: causal(ids)
        try:
            with clue_fast.patch(causal) as patched, patched.record("forget"):
                causal.generate(IDS)
            assert causal.__dict__["generate"] is own
            assert int(patched.statistics.count[0, 0]) == 28
        finally:
            del causal.__dict__["generate"]


class TestImages:
    @pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
    def test_images_follow_their_rows(self, name: str) -> None:
        model, batch = make_model(name), make_batch(name)
        pieces = {"llava": 5, "qwen2_vl": 16}[name]
        batch["token_group"] = torch.tensor([2, 0, 1], dtype=torch.int8)
        assert counted(model, batch, "vis") == [pieces, pieces]
        labels = batch.pop("labels")
        assert counted(model, batch, "language_model") == [7, 5]
        # Answers are the first token, after which images begin, and the last two, which padding ends in the first row:
        # nothing predicts the first, an image the next, and that the last.
        assert counted(model, batch | {"labels": labels}, "language_model") == [2, 0]

    def test_images_of_different_sizes_and_numbers(self) -> None:
        """Two images in the first row, none in the second, one in the third; 16, 24 and 16 patches, merged by four."""
        model = make_model("qwen2_vl")
        grid = torch.tensor([[1, 4, 4], [1, 4, 6], [1, 4, 4]])
        ids = torch.full((3, 12), 7)
        ids[0, 1:5], ids[0, 6:12], ids[2, 1:5] = IMAGE, IMAGE, IMAGE
        batch = {
            "input_ids": ids,
            "pixel_values": torch.randn(56, 96),
            "image_grid_thw": grid,
            "mm_token_type_ids": (ids == IMAGE).int(),
            "token_group": torch.tensor([1, 2, 2], dtype=torch.int8),
        }
        assert counted(model, batch, "visual") == [40, 16]

    def test_images_that_cannot_be_assigned(self) -> None:
        model, batch = make_model("llava"), make_batch("llava")
        batch["input_ids"][:, 1:5] = 7
        batch["input_ids"][0, 1:7] = IMAGE
        batch["input_ids"][1, 1:7] = IMAGE
        batch["token_group"] = torch.tensor([1, 2, 2], dtype=torch.int8)
        with pytest.raises(PatchError, match="which image belongs to which row"):
            counted(model, batch, "vision")

    def test_a_batch_of_one_group_needs_no_assignment(self) -> None:
        model, batch = make_model("llava"), make_batch("llava")
        assert counted(model, batch, "vision") == [15, 0]

    def test_generation(self) -> None:
        model, batch = make_model("llava"), make_batch("llava")
        del batch["labels"]
        with clue_fast.patch(model) as patched, patched.record("forget"):
            model.generate(**batch, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        counts = {
            site.path.split(".")[1]: int(n) for site, n in zip(patched.sites, patched.statistics.count[0], strict=True)
        }
        assert counts == {"vision_tower": 15, "language_model": 19 + 3 * 2}
