"""Batches by tensor indexing: no per-sample Python, no padding, no worker processes."""

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor

from data.schemas import Interactions, Samples, SeqBatch, TokenizedSeqBatch
from ops.jagged import JaggedTensor, lengths_to_offsets, row_indices


class SequenceSource:
    """Draws batches of samples of one split.

    interactions, samples: the data; its items move to `device` once.
    max_items: the history is the up to `max_items` items before the target.
    every_position: each item of the window is a target given those before it, not only the last.
    exclude_history: batches say what each user has consumed, so that it is not recommended again.
    """

    def __init__(
        self,
        interactions: Interactions,
        samples: Samples,
        max_items: int,
        device: torch.device,
        every_position: bool = False,
        exclude_history: bool = False,
    ) -> None:
        self.interactions = interactions
        self.samples = samples
        self.max_items = max_items
        self.device = device
        self.every_position = every_position
        self.exclude_history = exclude_history
        self._starts = interactions.offsets[samples.user]  # [S] row of each user's first interaction
        self._items = interactions.items.to(device)

    def __len__(self) -> int:
        return len(self.samples)

    def n_targets(self, index: Tensor, uniform: Tensor | None = None) -> int:
        """How many targets `batch` of the same arguments has."""
        if not self.every_position:
            return len(index)
        return int(self._position(index, uniform).clamp_max(self.max_items).sum())

    def _position(self, index: Tensor, uniform: Tensor | None) -> Tensor:
        position = self.samples.position[index]
        if uniform is None:
            return position
        return position + (uniform * (self.samples.slack[index] + 1)).long()

    def batch(self, index: Tensor, uniform: Tensor | None = None) -> SeqBatch:
        """index: [B] int64, of samples, on the CPU: their lengths are known to the host without a sync.

        uniform: [B] float64 in [0, 1), how far each position moves within its slack; None leaves all in place.
        """
        position = self._position(index, uniform)
        starts = self._starts[index]
        history, rows = self._slice(starts + position, position.clamp_max(self.max_items), self.max_items)
        if self.every_position:
            targets = history.with_values(self._items[rows + 1].long())
        else:
            targets = JaggedTensor.uniform(self._items[(starts + position).to(self.device)].long()[:, None])
        consumed = None
        if self.exclude_history:
            consumed, _ = self._slice(starts + position, position, int(position.max()))
        return SeqBatch(self.samples.user[index].to(self.device), history, targets, consumed)

    def _slice(self, ends: Tensor, lengths: Tensor, max_length: int) -> tuple[JaggedTensor, Tensor]:
        """The `lengths` items before the rows `ends`, and their rows. Shape: [B] -> rows of item ids, [T]."""
        offsets = lengths_to_offsets(lengths)
        total = int(offsets[-1])
        ends, offsets = ends.to(self.device), offsets.to(self.device)
        user = row_indices(offsets, total)
        rows = ends[user] - offsets[user + 1] + torch.arange(total, device=self.device)
        return JaggedTensor(self._items[rows].long(), offsets, max_length), rows

    def in_order(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[SeqBatch]:
        """Every sample once, in order; process `rank` gets every world_size-th batch."""
        for start in range(rank * batch_size, len(self), batch_size * world_size):
            yield self.batch(torch.arange(start, min(start + batch_size, len(self))))


class Shuffler:
    """Which samples make the global batch of a step, as a pure function of (seed, step).

    n: samples. An epoch is a permutation of them cut into batches of `batch_size` (n, if that is less); what
    fills no batch is left out, and comes in another epoch.
    """

    def __init__(self, n: int, batch_size: int, seed: int) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"Cannot draw batches of {batch_size} from {n} training samples.")
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed
        self._epoch, self._order = -1, torch.empty(0)

    def check_shares(self, n: int) -> None:
        """ValueError where a batch is too small for each of n shares to get a sample."""
        if n > self.batch_size:
            raise ValueError(
                f"A batch of {self.batch_size} samples does not go round {n} shares (processes x "
                "train.gradient_accumulate_every): raise train.batch_size."
            )

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """Sample numbers [B] int64 and a uniform number in [0, 1) for each [B] float64, on the CPU."""
        epoch, place = divmod(step, self.n // self.batch_size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "step", step))
        uniform = torch.rand(self.batch_size, dtype=torch.float64, generator=generator)
        return self._order[place * self.batch_size : (place + 1) * self.batch_size], uniform


def derive_seed(*parts: int | str) -> int:
    """A seed that depends on all parts; streams with different parts are independent."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def tokenize(batch: SeqBatch, codes: Tensor) -> TokenizedSeqBatch:
    """Writes the histories in semantic IDs. codes: [N, L'] int64, on the batch's device."""
    levels = codes.shape[1]
    history = batch.history
    tokens = JaggedTensor(codes[history.values].flatten(), history.offsets * levels, history.max_length * levels)
    return TokenizedSeqBatch(batch.user, tokens, batch.targets, batch.consumed)


def is_consumed(items: Tensor, consumed: JaggedTensor) -> Tensor:
    """Whether each item is among its row's consumed ones. Shape: items [B, M], B rows of item ids -> [B, M] bool."""
    total = consumed.values.shape[0]
    if total == 0:
        return torch.zeros_like(items, dtype=torch.bool)
    span = torch.maximum(items.max(), consumed.values.max()) + 1
    keys = (row_indices(consumed.offsets, total) * span + consumed.values).sort().values
    wanted = torch.arange(items.shape[0], device=items.device)[:, None] * span + items
    place = torch.searchsorted(keys, wanted).clamp_max(total - 1)
    return keys[place] == wanted
