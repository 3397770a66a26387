"""Batches by tensor indexing: no per-sample Python, no padding, no worker processes."""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.schemas import Interactions, Samples, SeqBatch
from data.splits import drawn
from ops.jagged import JaggedTensor, lengths_to_offsets, row_indices

CONSUMED_GRAIN = 16  # items a row, to a multiple of which the consumed ones of a batch are filled up


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
        self.interactions = interactions
        self.samples = samples
        self.max_items = max_items
        self.device = device
        self.every_position = every_position
        self._lengths = samples.position.clamp_max(max_items)  # [S] items of each history, on the host
        self._samples = Samples(samples.user.to(device), samples.position.to(device), samples.slack.to(device))
        self._starts = interactions.offsets[samples.user].to(device)  # [S] row of each user's first interaction
        self._items = interactions.items.to(device)
        self._first = first_occurrences(JaggedTensor(self._items, interactions.offsets.to(device), max_items))

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

    def batch(self, index: Tensor, uniform: Tensor | None = None) -> SeqBatch:
        """index: [B] int64, of samples, on the host: their lengths are known without asking the device.

        uniform: [B] float64 in [0, 1), how far each sample goes in its slack; None leaves all in place.
        """
        before = self.samples.position[index]
        ends = self.interactions.offsets[self.samples.user[index]] + before
        bounds = int(before.sum()), int(before.max())
        consumed, _ = self._slice(ends.to(self.device), before.to(self.device), *bounds)
        on_device = (index.to(self.device), uniform.to(self.device) if uniform is not None else None)
        return replace(self.device_batch(*on_device, self.n_items(index, uniform)), consumed=consumed)

    def device_batch(self, index: Tensor, uniform: Tensor | None, n_items: int, fillers: int = 0) -> SeqBatch:
        """The same from arguments on the device, without consumed items.

        n_items: items of the batch. If its histories have fewer, `fillers` more rows, of up to max_items items each,
        make up for them, so that batches of different lengths have equal shapes; their targets have weight 0.
        """
        position, lengths = drawn(self._samples, index, uniform, self.max_items)
        starts = self._starts[index]
        ends = starts + position
        user = self._samples.user[index]
        if fillers:
            places = torch.arange(fillers, device=self.device) * self.max_items
            filled = (n_items - lengths.sum() - places).clamp(0, self.max_items)
            lengths, ends = torch.cat([lengths, filled]), torch.cat([ends, filled])
            user, starts = F.pad(user, (0, fillers)), F.pad(starts, (0, fillers))
        history, rows = self._slice(ends, lengths, n_items, self.max_items)
        next_rows = (rows + 1 if self.every_position else ends).clamp_max(len(self._items) - 1)
        next_items = self._items[next_rows].long()
        if self.every_position:
            of = row_indices(history.offsets, n_items)
            starts = torch.where(of < len(index), starts[of], next_rows)  # fillers have seen nothing
        targets = history.with_values(next_items) if self.every_position else JaggedTensor.uniform(next_items[:, None])
        weights = None
        if fillers:
            real = torch.arange(len(user), device=self.device) < len(index)
            weights = real[row_indices(targets.offsets, len(targets.values))].float()
        return SeqBatch(user, history, targets, None, weights, (starts, next_rows, self._first))

    def _slice(self, ends: Tensor, lengths: Tensor, total: int, max_length: int) -> tuple[JaggedTensor, Tensor]:
        """The `lengths` items before the rows `ends`, and their rows. Shape: [B] -> rows of item ids, [T]."""
        offsets = lengths_to_offsets(lengths)
        user = row_indices(offsets, total)
        rows = ends[user] - offsets[user + 1] + torch.arange(total, device=self.device)
        items = self._items[rows.clamp_max(len(self._items) - 1)]  # fillers may ask for more than there are
        return JaggedTensor(items.long(), offsets, max_length), rows

    def filled_batch(self, index: Tensor, n_samples: int) -> SeqBatch:
        """`batch` filled up, so that most batches of a source have equal shapes; built without waiting for the device.

        The first samples of the source make up for those that `index` lacks, and fillers (see `device_batch`) for
        histories and consumed items up to a multiple of some number of items; their targets have weight 0.
        """
        index, n_real = torch.cat([index, torch.arange(n_samples - len(index)) % len(self)]), len(index)
        on_device, fillers = index.to(self.device, non_blocking=True), filler_rows(n_samples)
        n_items = filled_size(self.n_items(index), fillers, self.max_items)
        batch = self.device_batch(on_device, None, n_items, fillers)
        rows = row_indices(batch.targets.offsets, len(batch.targets.values))
        batch = replace(batch, target_weights=batch.target_weights.masked_fill(rows >= n_real, 0.0))
        total = filled_size(int(self.samples.position[index].sum()), n_samples, CONSUMED_GRAIN)
        lengths = F.pad(self._samples.position[on_device], (0, fillers))
        ends = F.pad(self._starts[on_device], (0, fillers)) + lengths
        spare = total - lengths.sum()  # of the first filler
        lengths[n_samples], ends[n_samples] = spare, spare
        return replace(batch, consumed=self._slice(ends, lengths, total, total)[0])

    def in_order(self, batch_size: int, rank: int = 0, world_size: int = 1, filled: bool = False) -> Iterator[SeqBatch]:
        """Every sample once, in order; process `rank` gets every world_size-th batch. filled: see `filled_batch`."""
        for start in range(rank * batch_size, len(self), batch_size * world_size):
            index = torch.arange(start, min(start + batch_size, len(self)))
            yield self.filled_batch(index, min(batch_size, len(self))) if filled else self.batch(index)


class Shuffler:
    """Which samples make the global batch of a step, as a pure function of (seed, step).

    n: samples. An epoch is a permutation of them cut into batches of `batch_size` (n, if that is less); what
    fills no batch is left out, and comes in another epoch. groups: [n] int64, samples that share their uniform number
    of an epoch, as the windows of a user do; None: no two do.
    """

    def __init__(self, n: int, batch_size: int, seed: int, groups: Tensor | None = None) -> None:
        if n < 1 or batch_size < 1:
            raise ValueError(f"Cannot draw batches of {batch_size} from {n} training samples.")
        self.n, self.batch_size, self.seed = n, min(batch_size, n), seed
        self._groups = torch.arange(n) if groups is None else groups
        self._epoch, self._order, self._uniform = -1, torch.empty(0), torch.empty(0)

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
            groups = int(self._groups.max()) + 1
            self._uniform = torch.rand(groups, dtype=torch.float64, generator=generator)
        index = self._order[place * self.batch_size : (place + 1) * self.batch_size]
        return index, self._uniform[self._groups[index]]


def filler_rows(batch_size: int) -> int:
    """How many rows may fill a batch up, so that a few sizes serve all batches.

    The items of a batch vary by its square root, and the sizes lie this many longest histories apart.
    """
    return math.isqrt(max(batch_size - 1, 0)) // 4 + 1


def filled_size(n_items: int, fillers: int, max_items: int) -> int:
    """Items of a batch of n_items when it is filled up; without filler rows those it has."""
    grain = fillers * max_items
    return -(-n_items // grain) * grain if fillers else n_items


def derive_seed(*parts: int | str) -> int:
    """A seed that depends on all parts; streams with different parts are independent."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "little")


def seed_noise(seed: int, device: torch.device) -> None:
    """Seeds the random numbers drawn on the device by default: dropout, Gumbel noise.

    On a GPU those alone: `torch.manual_seed` seeds all kinds of devices, which takes the host as long as a short step.
    """
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def first_occurrences(rows: JaggedTensor) -> Tensor:
    """The values with -1 where one occurs earlier in its row. values: [T] non-negative integers."""
    values = rows.values
    span = values.max() + 1 if len(values) else 1
    keys, order = (row_indices(rows.offsets, len(values)) * span + values).sort(stable=True)
    again = torch.zeros_like(keys, dtype=torch.bool)
    again[1:] = keys[1:] == keys[:-1]
    return values.masked_fill(torch.empty_like(again).index_copy(0, order, again), -1)
