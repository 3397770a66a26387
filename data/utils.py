"""Batches by tensor indexing: no per-sample Python, no padding, no worker processes."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data.schemas import Interactions, Samples, SeqBatch, TokenizedSeqBatch
from ops.jagged import JaggedTensor, lengths_to_offsets
from ops.reference import row_indices


class SequenceSource:
    """Draws batches of samples of one split.

    interactions, samples: the data; its items move to `device` once.
    max_items: the history is the up to `max_items` items before the target.
    every_position: each item of the window is a target given those before it, not only the last.
    """

    def __init__(
        self,
        interactions: Interactions,
        samples: Samples,
        max_items: int,
        device: torch.device,
        every_position: bool = False,
    ) -> None:
        self.samples = samples
        self.max_items = max_items
        self.device = device
        self.every_position = every_position
        self._ends = interactions.offsets[samples.user] + samples.position  # [S] row of each target
        self._items = interactions.items.to(device)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, index: Tensor) -> SeqBatch:
        """index [B] int64, of samples, on the CPU: their lengths are known to the host without a sync."""
        lengths = self.samples.position[index].clamp_max(self.max_items)
        offsets = lengths_to_offsets(lengths)
        total = int(offsets[-1])
        ends, offsets = self._ends[index].to(self.device), offsets.to(self.device)
        rows = row_indices(offsets, total)
        flat = ends[rows] - offsets[rows + 1] + torch.arange(total, device=self.device)
        history = JaggedTensor(self._items[flat].long(), offsets, self.max_items)
        if self.every_position:
            targets = history.with_values(self._items[flat + 1].long())
        else:
            targets = JaggedTensor.uniform(self._items[ends].long()[:, None])
        return SeqBatch(self.samples.user[index].to(self.device), history, targets)

    def in_order(self, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[SeqBatch]:
        """Every sample once, in order; process `rank` gets every world_size-th batch."""
        for start in range(rank * batch_size, len(self), batch_size * world_size):
            yield self.batch(torch.arange(start, min(start + batch_size, len(self))))


@dataclass
class Shuffler:
    """Sample numbers of batch number `step`, as a pure function of (seed, step, rank, world_size).

    An epoch is a permutation of the n samples cut into global batches; the rest of an epoch that fills no
    global batch is left out (it comes early in another). `batch_size` is that of the global batch; process `rank` of `world_size`
    gets its share, so the global batch is the same for any number of processes.
    """

    n: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(f"A global batch of {self.batch_size} does not split over {self.world_size} processes.")
        self.batch_size = min(self.batch_size, self.n - self.n % self.world_size)
        self._epoch, self._order = -1, torch.empty(0)

    def index(self, step: int) -> Tensor:
        """[batch_size / world_size] int64, on the CPU."""
        epoch, step = divmod(step, self.n // self.batch_size)
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=generator)
        share = self.batch_size // self.world_size
        start = step * self.batch_size + self.rank * share
        return self._order[start : start + share]


def tokenize(batch: SeqBatch, codes: Tensor) -> TokenizedSeqBatch:
    """Items to semantic IDs. codes: [N, L'] int64, on the batch's device."""
    levels = codes.shape[1]
    history = batch.history
    tokens = JaggedTensor(codes[history.values].flatten(), history.offsets * levels, history.max_length * levels)
    return TokenizedSeqBatch(batch.user, tokens, batch.targets.with_values(codes[batch.targets.values]))
