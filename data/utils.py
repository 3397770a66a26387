"""Batches by tensor indexing: no per-sample Python, no padding, no worker processes."""

import hashlib
from collections.abc import Iterator

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
        self._starts = interactions.offsets[samples.user]  # [S] row of each user's first interaction
        self._items = interactions.items.to(device)

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, index: Tensor, generator: torch.Generator | None = None) -> SeqBatch:
        """index: [B] int64, of samples, on the CPU: their lengths are known to the host without a sync.

        generator: draws how far each position moves within its slack; None leaves all where they are.
        """
        position = self.samples.position[index]
        if generator is not None:
            moves = torch.rand(len(index), generator=generator) * (self.samples.slack[index] + 1)
            position = position + moves.long()
        lengths = position.clamp_max(self.max_items)
        offsets = lengths_to_offsets(lengths)
        total = int(offsets[-1])
        ends = (self._starts[index] + position).to(self.device)  # [B] row of each last target
        offsets = offsets.to(self.device)
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


class Shuffler:
    """Which samples make batch number `step`, as a pure function of (seed, step, rank, world_size).

    n: samples. An epoch is a permutation of them cut into global batches; what fills no global batch is left
    out (and comes in another epoch). Process `rank` of `world_size` takes its share of each global batch of
    `batch_size`, which is thereby the same for any number of processes.
    """

    def __init__(self, n: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1) -> None:
        if batch_size % world_size:
            raise ValueError(f"A global batch of {batch_size} does not split over {world_size} processes.")
        if n < world_size:
            raise ValueError(f"{n} training samples are too few for {world_size} processes.")
        self.n, self.seed, self.rank, self.world_size = n, seed, rank, world_size
        self.batch_size = min(batch_size, n - n % world_size)
        self._epoch, self._order = -1, torch.empty(0)

    def index(self, step: int) -> Tensor:
        """[batch_size / world_size] int64, on the CPU."""
        epoch, place = divmod(step, self.n // self.batch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, torch.randperm(self.n, generator=self._seeded(0, epoch))
        share = self.batch_size // self.world_size
        start = place * self.batch_size + self.rank * share
        return self._order[start : start + share]

    def generator(self, step: int) -> torch.Generator:
        """A CPU generator for whatever else batch number `step` draws."""
        return self._seeded(1 + self.rank, step)

    def _seeded(self, stream: int, number: int) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed} {stream} {number}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def tokenize(batch: SeqBatch, codes: Tensor) -> TokenizedSeqBatch:
    """Writes the histories in semantic IDs. codes: [N, L'] int64, on the batch's device."""
    levels = codes.shape[1]
    history = batch.history
    tokens = JaggedTensor(codes[history.values].flatten(), history.offsets * levels, history.max_length * levels)
    return TokenizedSeqBatch(batch.user, tokens, batch.targets)
