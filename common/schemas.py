"""The types that pass between data, models and scripts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ops.jagged import JaggedTensor, row_indices


@dataclass(frozen=True)
class Interactions:
    """What every user consumed, in time order, as compressed sparse rows.

    items: [T] int32 item ids; user u's are `items[offsets[u]:offsets[u+1]]`.
    offsets: [U+1] int64.
    timestamps: [T] int64, of dates seconds, or None where the source has the order only.
    """

    items: Tensor
    offsets: Tensor
    timestamps: Tensor | None = None

    @property
    def n_users(self) -> int:
        return self.offsets.shape[0] - 1

    def __len__(self) -> int:
        return self.items.shape[0]


@dataclass(frozen=True)
class Samples:
    """Prediction tasks: the history is what `user` consumed before `position`, the target the item at it.

    user, position: [S] int64; positions count from the user's first interaction.
    slack: [S] int64, by how much the position may be moved later when the sample is drawn for training; negative: by
    how much the start of the history, which then gets shorter. See `data.splits.drawn`.
    """

    user: Tensor
    position: Tensor
    slack: Tensor

    def __len__(self) -> int:
        return self.user.shape[0]


@dataclass(frozen=True)
class SeqBatch:
    """B users' histories and what they consumed next.

    user: [B] int64. history: rows of n_b item ids, values [T] int64.
    targets: rows of m_b item ids, values [P] int64, m_b <= n_b: target i of row b followed the first
    n_b - m_b + 1 + i items of the history, so the last target followed all of it.
    consumed: rows of all item ids before the last target, not only the history; None in training.
    seen: first [P], last [P], items [T]: before target p its user had consumed items[first[p]:last[p]], where an item
    that the user had consumed earlier still is -1; the history is the last of them, and items[last[p]] the target. None
    where it does not matter.
    target_weights: [P] float32, what each target counts in the mean loss; None: all count 1.
    """

    user: Tensor
    history: JaggedTensor
    targets: JaggedTensor
    consumed: JaggedTensor | None = None
    target_weights: Tensor | None = None
    seen: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def n_before(self) -> Tensor:
        """How many items of its history came before each target, [P] int64."""
        first = self.history.lengths - self.targets.lengths + 1
        return first[row_indices(self.targets.offsets, len(self.targets.values))] + self.targets.positions()

    @property
    def weights(self) -> Tensor:
        """[P] float32: `target_weights`, or ones."""
        weights = self.target_weights
        return torch.ones(len(self.targets.values), device=self.user.device) if weights is None else weights


@dataclass(frozen=True)
class RankedItems:
    """Best items first. items: [B, K] int64, -1 where fewer than K exist; scores: [B, K] float32, -inf there."""

    items: Tensor
    scores: Tensor
