"""The types that pass between data, models and scripts."""

from dataclasses import dataclass

from torch import Tensor

from ops.jagged import JaggedTensor


@dataclass(frozen=True)
class Interactions:
    """What every user consumed, in time order, as compressed sparse rows.

    items: [T] int32 item ids; user u's are `items[offsets[u]:offsets[u+1]]`.
    offsets: [U+1] int64.
    timestamps: [T] int64 seconds, or None where the source has the order only.
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
    """

    user: Tensor
    position: Tensor

    def __len__(self) -> int:
        return self.user.shape[0]

    def __getitem__(self, index: Tensor | slice) -> "Samples":
        return Samples(self.user[index], self.position[index])


@dataclass(frozen=True)
class SeqBatch:
    """user [B] int64, history: item ids (values [T] int64), target [B] int64 item ids."""

    user: Tensor
    history: JaggedTensor
    target: Tensor


@dataclass(frozen=True)
class TokenizedSeqBatch:
    """user [B] int64; tokens: values [T * L'] int64, the codes of the history's items, L' = L + 1 an item;
    target [B, L'] int64 codes."""

    user: Tensor
    tokens: JaggedTensor
    target: Tensor


@dataclass(frozen=True)
class RankedItems:
    """Best items first. items [B, K] int64, -1 where fewer than K exist; log_probs [B, K] float32, -inf there."""

    items: Tensor
    log_probs: Tensor

