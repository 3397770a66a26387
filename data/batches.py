"""Batches by tensor indexing: no per-sample Python, no padding, no worker processes."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from common.schemas import Interactions, Samples, SeqBatch
from data.splits import drawn
from ops.jagged import JaggedTensor, lengths_to_offsets, row_indices

CONSUMED_BUCKET = 16  # items per row: a batch's consumed items are filled up to a multiple of them


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
        self.interactions, self.device, self.max_items = interactions, device, max_items
        self._items = interactions.items.to(device)
        self._first = first_occurrences(JaggedTensor(self._items, interactions.offsets.to(device), max_items))
        self._draw_from(samples, every_position)

    def with_samples(self, samples: Samples) -> "SequenceSource":
        """A source of other samples of the same data, whose items it shares; a target is the last of each alone."""
        source = copy.copy(self)
        source._draw_from(samples, every_position=False)
        return source

    def _draw_from(self, samples: Samples, every_position: bool) -> None:
        self.samples, self.every_position, device = samples, every_position, self.device
        self._lengths = samples.position.clamp_max(self.max_items)  # [S] items of each history, on the host
        self._samples = Samples(samples.user.to(device), samples.position.to(device), samples.slack.to(device))
        self._starts = self.interactions.offsets[samples.user].to(device)  # [S] row of each user's first interaction

    def __len__(self) -> int:
        return len(self.samples)

    def n_items(self, index: Tensor, uniform: Tensor | None = None) -> int:
        """How many items the histories of `batch` of the same arguments have."""
        if uniform is None:
            return int(self._lengths[index].sum())
        return int(drawn(self.samples, index, uniform, self.max_items)[1].sum())

    def n_targets(self, index: Tensor, uniform: Tensor | None = None) -> int:
        """How many targets `batch` of the same arguments has."""
        return self.n_items(index, uniform) if self.every_position else len(index)

    def batch(
        self, index: Tensor, uniform: Tensor | None = None, n_items: int | None = None, padding: int = 0
    ) -> SeqBatch:
        """Without consumed items.

        index: [B] int64, of samples, on the device where n_items is given, else on the host, which knows their lengths.
        uniform: [B] float64 in [0, 1), how far each sample goes in its slack; None leaves all in place.
        n_items: items of the batch. If its histories have fewer, `padding` more rows, of up to max_items items each,
        make up for them, so that batches of different lengths have equal shapes; their targets have weight 0.
        """
        if n_items is None:
            n_items, index = self.n_items(index, uniform), index.to(self.device)
            uniform = None if uniform is None else uniform.to(self.device)
        position, lengths = drawn(self._samples, index, uniform, self.max_items)
        starts = self._starts[index]
        ends = starts + position
        user = self._samples.user[index]
        if padding:
            places = torch.arange(padding, device=self.device) * self.max_items
            filled = (n_items - lengths.sum() - places).clamp(0, self.max_items)
            lengths, ends = torch.cat([lengths, filled]), torch.cat([ends, filled])
            user, starts = F.pad(user, (0, padding)), F.pad(starts, (0, padding))
        history, rows = self._slice(ends, lengths, n_items, self.max_items)
        next_rows = (rows + 1 if self.every_position else ends).clamp_max(len(self._items) - 1)
        next_items = self._items[next_rows].long()
        if self.every_position:
            of = row_indices(history.offsets, n_items)
            starts = torch.where(of < len(index), starts[of], next_rows)  # padding rows have seen nothing
        targets = history.with_values(next_items) if self.every_position else JaggedTensor.uniform(next_items[:, None])
        weights = None
        if padding:
            real = torch.arange(len(user), device=self.device) < len(index)
            weights = real[row_indices(targets.offsets, len(targets.values))].float()
        return SeqBatch(user, history, targets, None, weights, (starts, next_rows, self._first))

    def _slice(self, ends: Tensor, lengths: Tensor, total: int, max_length: int) -> tuple[JaggedTensor, Tensor]:
        """The `lengths` items before the rows `ends`, and their rows. Shape: [B] -> rows of item ids, [T]."""
        offsets = lengths_to_offsets(lengths)
        user = row_indices(offsets, total)
        rows = ends[user] - offsets[user + 1] + torch.arange(total, device=self.device)
        items = self._items[rows.clamp_max(len(self._items) - 1)]  # padding rows may ask for more than there are
        return JaggedTensor(items.long(), offsets, max_length), rows

    def in_order(self, batch_size: int, rank: int = 0, world_size: int = 1, filled: bool = False) -> Iterator[SeqBatch]:
        """Every sample once, in order, with consumed items; process `rank` gets every world_size-th batch. filled:
        samples and items are filled up, so that most batches have equal shapes, without waiting for the device: by the
        first samples, whose targets have weight 0 then, and by padding rows (see `batch`)."""
        for start in range(rank * batch_size, len(self), batch_size * world_size):
            index = torch.arange(start, min(start + batch_size, len(self)))
            yield self._with_consumed(index, min(batch_size, len(self)) if filled else 0)

    def _with_consumed(self, index: Tensor, n_samples: int) -> SeqBatch:
        """n_samples: to be filled up to, 0: not at all."""
        n_real, padding = len(index), padding_rows(n_samples) if n_samples else 0
        index = torch.cat([index, torch.arange(max(n_samples - n_real, 0)) % len(self)])
        on_device, position = index.to(self.device, non_blocking=True), self.samples.position[index]
        batch = self.batch(on_device, None, bucket_size(self.n_items(index), padding, self.max_items), padding)
        total, longest = bucket_size(int(position.sum()), n_samples, CONSUMED_BUCKET), int(position.max())
        lengths = F.pad(self._samples.position[on_device], (0, padding))
        ends = F.pad(self._starts[on_device], (0, padding)) + lengths
        if padding:
            spare, longest = total - lengths.sum(), total  # of the first padding row
            lengths[n_samples], ends[n_samples] = spare, spare
            rows = row_indices(batch.targets.offsets, len(batch.targets.values))
            batch = replace(batch, target_weights=batch.weights.masked_fill(rows >= n_real, 0.0))
        return replace(batch, consumed=self._slice(ends, lengths, total, longest)[0])


def padding_rows(batch_size: int) -> int:
    """How many rows may fill a batch up, so that a few sizes serve all batches. The items of a batch vary by its square
    root, and the sizes lie this many longest histories apart."""
    return math.isqrt(max(batch_size - 1, 0)) // 4 + 1


def bucket_size(n_items: int, padding: int, max_items: int) -> int:
    """Items of a batch of n_items with its padding rows: a multiple of what those hold; without them n_items."""
    bucket = padding * max_items
    return -(-n_items // bucket) * bucket if padding else n_items


def first_occurrences(rows: JaggedTensor) -> Tensor:
    """The values with -1 where one occurs earlier in its row. values: [T] non-negative integers."""
    values = rows.values
    span = values.max() + 1 if len(values) else 1
    keys, order = (row_indices(rows.offsets, len(values)) * span + values).sort(stable=True)
    again = torch.zeros_like(keys, dtype=torch.bool)
    again[1:] = keys[1:] == keys[:-1]
    return values.masked_fill(torch.empty_like(again).index_copy(0, order, again), -1)
