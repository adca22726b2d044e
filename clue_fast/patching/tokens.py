"""Which tokens of a forward pass count, and into which group.

A model has one or several towers, each with tokens of its own: the text of a causal language model; encoder and
decoder of a sequence-to-sequence model; the images of a vision-language model beside its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clue_fast.errors import PatchError

TEXT, ENCODER, DECODER, IMAGES = "text", "encoder", "decoder", "images"
ANSWERS, ATTENDED = "answers", "attended"
IGNORED_LABEL = -100


@dataclass(frozen=True)
class TokenGroups:
    """Groups of the tokens of one tower.

    Attributes:
        group: [tokens] int8; 0 is not counted.
        counts: [groups] int64, how many tokens each group has.
    """

    group: Tensor
    counts: Tensor


@dataclass
class Batch:
    """One forward pass: what decides on the groups of its tokens, tower by tower.

    Attributes:
        default: group of the rows where the batch does not say.
        groups: number of groups there are.
        tokens: ``answers``, ``attended`` or None, see ``Patched.record``.
        inputs: arguments of the model's forward, by name.
        given: the batch's own ``token_group``, [batch] or [batch, tokens], or None.
        decoder_given: its ``decoder_token_group``, [batch, tokens], or None.
        image_token: id of the token that stands for a piece of an image, or None.
        towers: what was found so far.
    """

    default: int
    groups: int
    tokens: str | None
    inputs: Mapping[str, Any]
    given: Tensor | None = None
    decoder_given: Tensor | None = None
    image_token: int | None = None
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

    def images(self, tokens: int, device: torch.device) -> TokenGroups:
        """Returns the groups of the pieces of images in flight: those of the rows that the images belong to."""
        rows = self.rows()
        numbers = None if rows is None else rows.tolist()
        if numbers is None or len(set(numbers)) <= 1:
            value = self.default if not numbers else numbers[0]
            return self.put(IMAGES, torch.full((tokens,), value, dtype=torch.int8, device=device))
        sizes = self._image_sizes(tokens)
        owners = self._image_rows(sizes)
        group = torch.tensor([numbers[row] for row in owners], dtype=torch.int8)
        return self.put(IMAGES, group.repeat_interleave(torch.tensor(sizes)).to(device))

    def same_groups(self, other: Batch) -> bool:
        """Returns whether the tokens of another batch are in the same groups, tower by tower."""
        return self.towers.keys() == other.towers.keys() and all(
            torch.equal(found.group, other.towers[tower].group) for tower, found in self.towers.items()
        )

    def check(self) -> Tensor | None:
        """Raises PatchError if the batch brings a group that there is not.

        Compiled code cannot raise: it returns how many tokens are in such a group, [] int64, or None.
        """
        outside = None
        for name, given in (("token_group", self.given), ("decoder_token_group", self.decoder_given)):
            if given is None or given.numel() == 0:
                continue
            wrong = ((given < 0) | (given > self.groups)).sum()
            if torch.compiler.is_compiling():
                outside = wrong if outside is None else outside + wrong
            elif bool(wrong):
                low, high = int(given.min()), int(given.max())
                raise PatchError(f"{name} holds {low}..{high}, the recorded groups are 0..{self.groups}")
        return outside

    def _explicit(self, given: Tensor, shape: tuple[int, int], tower: str) -> Tensor:
        if tuple(given.shape) != shape:
            name = "decoder_token_group" if tower == DECODER else "token_group"
            raise PatchError(f"{name} has shape {tuple(given.shape)}, the batch has tokens {shape}")
        return given.to(torch.int8)

    def _attended(self, inputs: Mapping[str, Any], shape: tuple[int, int], tower: str, device: torch.device) -> Tensor:
        """Which tokens count if nothing but masks and labels decides, [batch, tokens] bool."""
        counted = torch.ones(shape, dtype=torch.bool, device=device)
        mask = inputs.get("attention_mask")
        labels = self.inputs.get("labels") if tower in (TEXT, DECODER) else None
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
            counted &= labels.to(device) != IGNORED_LABEL  # type: ignore[union-attr]
        return counted

    def _image_sizes(self, tokens: int) -> list[int]:
        """How many tokens of the image tower each image has."""
        for grid in (self.inputs.get("image_grid_thw"), self.inputs.get("video_grid_thw")):
            if isinstance(grid, Tensor) and int(grid.prod(1).sum()) == tokens:
                return [int(size) for size in grid.prod(1)]
        pixels = self.inputs.get("pixel_values")
        images = len(pixels) if isinstance(pixels, Tensor) else 0
        if images and tokens % images == 0:
            return [tokens // images] * images
        raise PatchError(f"cannot tell how {tokens} image tokens are shared by the images; give batches of one group")

    def _image_rows(self, sizes: list[int]) -> list[int]:
        """Which row each image belongs to, by the number of image tokens in the text of the rows."""
        ids = self.inputs.get("input_ids")
        held = [] if ids is None or self.image_token is None else (ids == self.image_token).sum(1).tolist()
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
