"""Batches by tensor indexing: no per-sample Python, no padding, no worker processes."""

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from common.schemas import Interactions, Samples, SeqBatch
from data.splits import drawn
from ops.jagged import JaggedTensor, first_occurrences, jagged_to_padded, lengths_to_offsets, row_indices

CONSUMED_BUCKET = 16  # items per row: a batch's consumed items are filled up to a multiple of them


class Sizes(NamedTuple):
    """Of a batch: items of its histories, consumed items, the most of one row, and padding rows."""

    n_items: int
    n_consumed: int
    longest: int
    padding: int


class SequenceData:
    """Interactions on a device, to make batches of. max_items: a history is the last max_items before a target."""

    def __init__(self, interactions: Interactions, max_items: int, device: torch.device) -> None:
        self.max_items, self.device = max_items, device
        self._items = interactions.items.to(device)
        self._first = first_occurrences(JaggedTensor(self._items, interactions.offsets.to(device), max_items))

    def batch(
        self,
        user: Tensor,
        starts: Tensor,
        position: Tensor,
        lengths: Tensor,
        n_items: int,
        padding: int,
        every_position: bool,
    ) -> SeqBatch:
        """B histories of the items before `position`, counted from the user's first interaction, which is row `starts`:
        `lengths` items, n_items in all, or fewer, for which `padding` more rows make up. All of them [B] int64."""
        ends, n_samples = starts + position, len(user)
        if padding:
            places = torch.arange(padding, device=self.device) * self.max_items
            filled = (n_items - lengths.sum() - places).clamp(0, self.max_items)
            lengths, ends = torch.cat([lengths, filled]), torch.cat([ends, filled])
            user, starts = F.pad(user, (0, padding)), F.pad(starts, (0, padding))
        history, rows = self._slice(ends, lengths, n_items, self.max_items)
        next_rows = (rows + 1 if every_position else ends).clamp_max(len(self._items) - 1)
        next_items = self._items[next_rows].long()
        if every_position:
            of = row_indices(history.offsets, n_items)
            starts = torch.where(of < n_samples, starts[of], next_rows)  # padding rows have seen nothing
        targets = history.with_values(next_items) if every_position else JaggedTensor.uniform(next_items[:, None])
        weights = None
        if padding:
            real = torch.arange(len(user), device=self.device) < n_samples
            weights = real[row_indices(targets.offsets, len(targets.values))].float()
        return SeqBatch(user, history, targets, None, weights, (starts, next_rows, self._first))

    def planned(self, sizes: Sizes, samples: Tensor, n_real: Tensor) -> SeqBatch:
        """A batch of `SequenceSource.in_order`, no step of which waits for the device. samples: [3, B] int64: users,
        starts and positions as of `batch`. n_real: [], how many of them count."""
        user, starts, position = samples.unbind()
        lengths = position.clamp_max(self.max_items)
        batch = self.batch(user, starts, position, lengths, sizes.n_items, sizes.padding, every_position=False)
        lengths = F.pad(position, (0, sizes.padding))
        ends = F.pad(starts, (0, sizes.padding)) + lengths
        if sizes.padding:
            spare = sizes.n_consumed - lengths.sum()  # of the first padding row
            lengths[len(user)], ends[len(user)] = spare, spare
            rows = row_indices(batch.targets.offsets, len(batch.targets.values))
            batch = replace(batch, target_weights=batch.weights.masked_fill(rows >= n_real, 0.0))
        return replace(batch, consumed=self._slice(ends, lengths, sizes.n_consumed, sizes.longest)[0])

    def _slice(self, ends: Tensor, lengths: Tensor, total: int, max_length: int) -> tuple[JaggedTensor, Tensor]:
        """The `lengths` items before the rows `ends`, and their rows. Shape: [B] -> rows of item ids, [T]."""
        offsets = lengths_to_offsets(lengths)
        user = row_indices(offsets, total)
        rows = ends[user] - offsets[user + 1] + torch.arange(total, device=self.device)
        items = self._items[rows.clamp_max(len(self._items) - 1)]  # padding rows may ask for more than there are
        return JaggedTensor(items.long(), offsets, max_length), rows


class SequenceSource:
    """Draws batches of samples of one split.

    interactions, samples: the data; its items move to `device` once.
    max_items: the history is the up to `max_items` items before the target.
    every_position: each item of the window is a target given those before it, not only the last.
    data: what makes the batches, and knows nothing of the samples.
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
        self.data = SequenceData(interactions, max_items, device)
        self._draw_from(samples, every_position)

    def with_samples(self, samples: Samples) -> "SequenceSource":
        """A source of other samples of the same data, which it shares; a target is the last of each alone."""
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

    def lengths(self, index: Tensor, uniform: Tensor | None = None) -> Tensor:
        """How many items the histories of `batch` of the same arguments have, [B] int64, on the host."""
        if uniform is None:
            return self._lengths[index]
        return drawn(self.samples, index, uniform, self.max_items)[1]

    def n_items(self, index: Tensor, uniform: Tensor | None = None) -> int:
        """How many items these histories have together."""
        return int(self.lengths(index, uniform).sum())

    def n_targets(self, lengths: Tensor) -> int:
        """How many targets a batch has whose histories have these lengths."""
        return int(lengths.sum()) if self.every_position else len(lengths)

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
        user, starts = self._samples.user[index], self._starts[index]
        return self.data.batch(user, starts, position, lengths, n_items, padding, self.every_position)

    def in_order(self, batch_size: int, rank: int = 0, world_size: int = 1, filled: bool = False) -> Iterator[SeqBatch]:
        """Every sample once, in order, one target each, with consumed items; process `rank` gets every world_size-th
        batch. filled: samples and items are filled up, so that most batches have equal shapes: by the first samples,
        whose targets have weight 0 then, and by padding rows (see `batch`)."""
        for sizes, samples, n_real in self.plans(batch_size, rank, world_size, filled):
            yield self.data.planned(sizes, samples.to(self.device), n_real.to(self.device))

    def plans(
        self, batch_size: int, rank: int = 0, world_size: int = 1, filled: bool = False
    ) -> Iterator[tuple[Sizes, Tensor, Tensor]]:
        """Arguments of `SequenceData.planned`, on the host, for each batch of `in_order`."""
        n_samples = min(batch_size, len(self)) if filled else 0
        padding = padding_rows(n_samples) if filled else 0
        for start in range(rank * batch_size, len(self), batch_size * world_size):
            index = torch.arange(start, min(start + batch_size, len(self)))
            n_real = torch.tensor(len(index))
            index = torch.cat([index, torch.arange(max(n_samples - len(index), 0)) % len(self)])
            user, position = self.samples.user[index], self.samples.position[index]
            n_items = bucket_size(self.n_items(index), padding, self.max_items)
            n_consumed = bucket_size(int(position.sum()), n_samples, CONSUMED_BUCKET)
            sizes = Sizes(n_items, n_consumed, n_consumed if filled else int(position.max()), padding)
            yield sizes, torch.stack([user, self.interactions.offsets[user], position]), n_real


def padding_rows(batch_size: int) -> int:
    """How many rows may fill a batch up, so that a few sizes serve all batches. The items of a batch vary by its square
    root, and the sizes lie this many longest histories apart."""
    return math.isqrt(max(batch_size - 1, 0)) // 4 + 1


def bucket_size(n_items: int, padding: int, max_items: int) -> int:
    """Items of a batch of n_items with its padding rows: a multiple of what those hold; without them n_items."""
    bucket = padding * max_items
    return -(-n_items // bucket) * bucket if padding else n_items


def history_items(batch: SeqBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct items of each history, [B, L] int64, L the most that one may have, -1 for none; which of them the
    user had consumed before each target, [P, L] bool; which targets were consumed before, [P] bool. Nothing was where
    `seen` is None.

    A target has seen the items before it, and those later ones that were consumed before the history began as well."""
    history, targets = batch.history, batch.targets
    items = jagged_to_padded(first_occurrences(history) + 1, history.offsets, history.max_length) - 1
    rows = row_indices(targets.offsets, len(targets.values))
    if batch.seen is None:
        return items, torch.zeros_like(items, dtype=torch.bool)[rows], torch.zeros_like(rows, dtype=torch.bool)
    _, last, consumed = batch.seen
    places = torch.arange(history.max_length, device=items.device)
    begins = last[targets.offsets[1:] - 1] - history.lengths  # [B], of the histories among the consumed
    again = consumed[(begins[:, None] + places).clamp(0, len(consumed) - 1)] < 0  # [B, L]
    return items, (places < batch.n_before[:, None]) | again[rows], consumed[last] < 0
