"""Which tokens of a forward pass count, and into which group.

A model has one or several towers, each with tokens of its own: the text of a causal language model; encoder and
decoder of a sequence-to-sequence model; the images of a vision-language model beside its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from clue_fast.data import answer_mask
from clue_fast.errors import PatchError
from clue_fast.sites import unwrap

TEXT, ENCODER, DECODER, IMAGES = "text", "encoder", "decoder", "images"
ANSWERS, ATTENDED = "answers", "attended"
_OTHER_SENSES = ("vision_config", "audio_config")


@dataclass(frozen=True)
class TokenGroups:
    """Groups of the tokens of one tower.

    Attributes:
        group: [tokens] int8; 0 is not counted.
        counts: [groups] int64, how many tokens each group has.
    """

    group: Tensor
    counts: Tensor


@dataclass(frozen=True)
class Images:
    """The images of a batch: what is needed to tell which row each belongs to.

    Attributes:
        count: number of images, where all are of one size.
        grids: [images, 3] of images and of videos, where each has its own.
        held: [rows], tokens of the text that stand for pieces of images, or None.
    """

    count: int
    grids: tuple[Tensor, ...]
    held: Tensor | None

    @classmethod
    def among(cls, inputs: Mapping[str, Any], token: int | None) -> Images | None:
        """Returns the images among the inputs of a model, or None.

        Args:
            inputs: arguments of the model's forward, by name.
            token: id that stands for a piece of an image.
        """
        grids = [inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")]
        pixels, ids = inputs.get("pixel_values"), inputs.get("input_ids")
        if not isinstance(pixels, Tensor) and all(grid is None for grid in grids):
            return None
        held = None if token is None or not isinstance(ids, Tensor) else (ids == token).sum(1)
        count = len(pixels) if isinstance(pixels, Tensor) else 0
        return cls(count, tuple(grid for grid in grids if isinstance(grid, Tensor)), held)

    def sizes_of(self, tokens: int) -> list[int]:
        """Returns how many of so many tokens of the image tower each image has. Raises PatchError if that is open."""
        for grid in self.grids:
            if int(grid.prod(1).sum()) == tokens:
                return [int(size) for size in grid.prod(1)]
        if self.count and tokens % self.count == 0:
            return [tokens // self.count] * self.count
        raise PatchError(f"cannot tell how {tokens} image tokens are shared by the images; give batches of one group")

    def rows_of(self, sizes: list[int]) -> list[int]:
        """Returns which row each image belongs to, by the image tokens in the text. Raises PatchError if that is open.

        Args:
            sizes: of the images, in their order.
        """
        held = [] if self.held is None else self.held.tolist()
        total, whole = sum(held), sum(sizes)
        owners, row, left = [], 0, held[0] * whole if held else 0
        for size in sizes:
            while left == 0 and row + 1 < len(held):
                row += 1
                left = held[row] * whole
            left -= size * total
            owners.append(row)
            if left < 0:
                break
        if not held or total == 0 or left != 0 or len(owners) != len(sizes):
            raise PatchError("cannot tell which image belongs to which row; give batches of one group")
        return owners


@dataclass
class Batch:
    """One forward pass: what decides on the groups of its tokens, tower by tower.

    Attributes:
        default: group of the rows where the batch does not say.
        groups: number of groups there are.
        tokens: ``answers``, ``attended`` or None, see ``Patched.record``.
        head: how labels relate to positions, see ``clue_fast.data.collator``; None where the model has no head.
        labels: of the batch, if it has any.
        images: how many there are, or how large each is, and the token ids of the text that they belong to.
        given: the batch's own ``token_group``, [batch] or [batch, tokens], or None.
        decoder_given: its ``decoder_token_group``, [batch, tokens], or None.
        towers: what was found so far.
    """

    default: int
    groups: int
    tokens: str | None
    head: str | None = None
    labels: Tensor | None = None
    images: Images | None = None
    given: Tensor | None = None
    decoder_given: Tensor | None = None
    towers: dict[str, TokenGroups] = field(default_factory=dict)

    def assign(self, tower: str, inputs: Mapping[str, Any], seen: int = 0) -> None:
        """Works out the groups of the tokens that a tower is given.

        Args:
            tower: TEXT, ENCODER or DECODER.
            inputs: arguments of the tower's forward, by name.
            seen: number of leading positions that an earlier pass counted already.

        Raises:
            PatchError: the groups do not fit the tokens, or are outside 0..groups.
        """
        tokens = inputs.get("input_ids")
        tokens = inputs.get("inputs_embeds") if tokens is None else tokens
        if not isinstance(tokens, Tensor):
            raise PatchError(f"recording found neither input_ids nor inputs_embeds among the inputs of the {tower}")
        shape = (tokens.shape[0], tokens.shape[1])
        given = self.decoder_given if tower == DECODER else self.given
        if given is not None and given.dim() == 2:
            group = self._explicit(given, shape, tower)
        else:
            counted = self._attended(inputs, shape, tower, tokens.device)
            rows = self.rows()
            value = self.default if rows is None else rows.to(tokens.device)[:, None]
            if rows is not None and len(rows) != shape[0]:
                raise PatchError(f"token_group is of {len(rows)} rows, the {tower} has {shape[0]}")
            group = counted.to(torch.int8) * value
        if seen:
            group = torch.cat([torch.zeros_like(group[:, :seen]), group[:, seen:]], dim=1)
        self.put(tower, group.flatten())

    def put(self, tower: str, group: Tensor) -> TokenGroups:
        """Keeps the groups of the tokens of a tower, and counts them."""
        numbers = torch.arange(1, self.groups + 1, dtype=torch.int8, device=group.device)
        found = TokenGroups(group, (group == numbers[:, None]).sum(1))
        self.towers[tower] = found
        return found

    def rows(self) -> Tensor | None:
        """Returns the group of each row, [batch] int8, or None if all are in the default group.

        Raises:
            PatchError: the tokens of a row are in different groups.
        """
        if self.given is None or self.given.dim() == 1:
            return None if self.given is None else self.given.to(torch.int8)
        if self.given.shape[1] == 0:
            return self.given.new_zeros(len(self.given), dtype=torch.int8)
        rows = self.given.amax(1)
        if not torch.compiler.is_compiling():
            mixed = ((self.given != 0) & (self.given != rows[:, None])).any(1)
            if bool(mixed.any()):
                row = int(mixed.nonzero()[0])
                raise PatchError(
                    f"row {row} of token_group holds several groups, so that its tokens in another tower belong to "
                    "none; give each record a row of its own"
                )
        return rows.to(torch.int8)

    def assign_images(self, tokens: int, device: torch.device) -> TokenGroups:
        """Returns the groups of the pieces of images in flight: those of the rows that the images belong to."""
        rows = self.rows()
        numbers = None if rows is None else rows.tolist()
        if numbers is None or len(set(numbers)) <= 1:
            value = self.default if not numbers else numbers[0]
            return self.put(IMAGES, torch.full((tokens,), value, dtype=torch.int8, device=device))
        if self.images is None:
            raise PatchError("images are read outside of the forward of the model; give batches of one group")
        sizes = self.images.sizes_of(tokens)
        owners = self.images.rows_of(sizes)
        group = torch.tensor([numbers[row] for row in owners], dtype=torch.int8, device="cpu")
        return self.put(IMAGES, group.repeat_interleave(torch.tensor(sizes, device="cpu")).to(device))

    def same_groups(self, other: Batch) -> bool:
        """Returns whether the tokens of another batch are in the same groups, tower by tower."""
        return self.towers.keys() == other.towers.keys() and all(
            torch.equal(found.group, other.towers[tower].group) for tower, found in self.towers.items()
        )

    def check(self) -> Tensor | None:
        """Raises PatchError if the batch brings a group that there is not.

        Compiled code cannot raise: it returns how many tokens are in such a group, [] int64, or None.
        """
        invalid = None
        for name, given in (("token_group", self.given), ("decoder_token_group", self.decoder_given)):
            if given is None or given.numel() == 0:
                continue
            wrong = ((given < 0) | (given > self.groups)).sum()
            if torch.compiler.is_compiling():
                invalid = wrong if invalid is None else invalid + wrong
            elif bool(wrong):
                low, high = int(given.min()), int(given.max())
                raise PatchError(f"{name} holds {low}..{high}, the recorded groups are 0..{self.groups}")
        return invalid

    def _explicit(self, given: Tensor, shape: tuple[int, int], tower: str) -> Tensor:
        if tuple(given.shape) != shape:
            name = "decoder_token_group" if tower == DECODER else "token_group"
            raise PatchError(f"{name} has shape {tuple(given.shape)}, the batch has tokens {shape}")
        return given.to(torch.int8)

    def _attended(self, inputs: Mapping[str, Any], shape: tuple[int, int], tower: str, device: torch.device) -> Tensor:
        """Which tokens count if nothing but masks and labels decides, [batch, tokens] bool."""
        counted = torch.ones(shape, dtype=torch.bool, device=device)
        mask = inputs.get("attention_mask")
        labels = self.labels if tower in (TEXT, DECODER) else None
        fitting = isinstance(labels, Tensor) and tuple(labels.shape) == shape
        # Where the decoder is given no mask, labels are all that tells its padding.
        answers = fitting and (self.tokens != ATTENDED or (tower == DECODER and mask is None))
        if self.tokens == ANSWERS and tower in (TEXT, DECODER) and not fitting:
            raise PatchError(f"only answer tokens are to count, but the batch has no labels of shape {shape}")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == shape[0] and mask.shape[1] >= shape[1]:
            # While generating, the mask also covers tokens of earlier calls; the last ones belong to this call.
            counted &= mask[:, mask.shape[1] - shape[1] :] != 0
        elif mask is not None and not answers:
            found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise PatchError(
                f"recording reads attention_mask as [batch, tokens], got {found} for tokens {shape}; pass token_group"
            )
        if answers:
            if self.head is None:
                raise PatchError(
                    "the model has no head that is known, so that it is open which positions predict the labels of the "
                    'batch; record the model with its head, pass token_group, or tokens="attended"'
                )
            counted &= answer_mask(labels.to(device), self.head)  # type: ignore[union-attr]
        return counted


def entry(model: nn.Module) -> nn.Module:
    """Returns the model proper, below all wrappers and peft: its forward takes the batch."""
    model = unwrap(model)
    while callable(get_base_model := getattr(model, "get_base_model", None)):
        model = unwrap(get_base_model())
    return model


def find_towers(model: nn.Module) -> dict[nn.Module, str]:
    """Returns the modules whose tokens are not those of the model's own inputs, with their names.

    An encoder and a decoder take tokens of their own. Beside the language model of a vision-language model,
    everything sees images.
    """
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return {model.get_encoder(): ENCODER, model.get_decoder(): DECODER}  # type: ignore[operator]
    if getattr(model, "main_input_name", None) == "pixel_values":
        return {model: IMAGES}
    if any(getattr(config, name, None) is not None for name in _OTHER_SENSES):
        return {model: IMAGES, model.get_decoder(): TEXT}  # type: ignore[operator]
    return {}


def tower_of(path: str, towers: Mapping[str, str]) -> str:
    """Returns the tower that a module belongs to.

    Args:
        path: of the module.
        towers: name of the tower by path of its module; the innermost counts.
    """
    holding = [root for root in towers if root == "" or path == root or path.startswith(f"{root}.")]
    return towers[max(holding, key=len)] if holding else TEXT


def image_token(model: nn.Module) -> int | None:
    """Returns the id of the token that stands for a piece of an image, if the model has one."""
    config: Any = getattr(model, "config", None)
    found = [getattr(config, name, None) for name in ("image_token_id", "image_token_index")]
    return next((token for token in found if isinstance(token, int)), None)
