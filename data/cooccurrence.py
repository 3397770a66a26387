"""Item vectors from what users consumed close together in the training data."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from common.parameters import PositiveInt, configurable
from common.schemas import Interactions
from data.corpus import Corpus
from data.items import Items, look_up, vector_table
from data.splits import in_training
from ops.jagged import row_indices

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

NEIGHBOURS = 1000  # entries of a row of M that are kept
OVERSAMPLES, ITERATIONS = 32, 4  # of the randomized decomposition


@configurable
@dataclass(frozen=True)
class CoOccurrenceSvd:
    """Factorized positive pointwise mutual information of items within a window (Levy and Goldberg 2014).

    dim: D. window: largest distance of two interactions of a user that counts; a pair at distance w counts 1/w.

    M[i, j] = max(0, log(C[i, j] * sum_k C[k]^0.75 / (C[i] * C[j]^0.75))) with C the symmetric counts, and a row
    without index their sums; the vectors are U S^(1/2) of its truncated singular value decomposition (randomized, Halko
    et al. 2011), scaled to length 1 and centred over the items that occur. Items that the training data never shows get
    zeros. Of each row of M the largest entries are kept (NEIGHBOURS).

    It tells the tokenizer which items are consumed together, which texts often don't: items with common
    consumers come to share code prefixes. It never reads a validation or test interaction. Fitted vectors are kept by
    item key; other items get zeros as well, the mean of the items that occur.
    """

    from_interactions = True
    dim: PositiveInt = 128
    window: PositiveInt = 5

    @property
    def settings(self) -> dict:
        return asdict(self)

    @property
    def identity(self) -> str:
        return f"co-occurrence-svd(dim={self.dim}, window={self.window})"

    def content(self, corpus: Corpus, train_lengths: Tensor) -> str:
        read = (corpus.interactions.items, train_lengths)  # items at the same time may be in another order than stored
        return hashlib.sha256(corpus.hash.encode() + b"".join(part.numpy().tobytes() for part in read)).hexdigest()[:16]

    def fit(self, corpus: Corpus, train_lengths: Tensor) -> dict[str, Tensor]:
        """The vectors [N, dim] float32 by item key. ValueError where dim is more than the number of items allows, or
        nothing co-occurs."""
        if self.dim >= corpus.n_items:
            raise ValueError(
                f"CoOccurrenceSvd.dim = {self.dim} does not fit {corpus.n_items} items: "
                f"the largest possible value is {corpus.n_items - 1}"
            )
        matrix, seen = mutual_information(corpus.interactions, train_lengths, corpus.n_items, self.window)
        if not matrix.nnz:
            raise ValueError(f"{self.identity} finds no items in the training data that go together")
        device = PartialState().device
        svd = sklearn_svd if device.type == "cpu" else partial(torch_svd, device=device)
        left, singular = svd(matrix, self.dim)
        values = left * np.sqrt(singular)
        values /= np.linalg.norm(values, axis=1, keepdims=True).clip(min=1e-9)
        values[seen] -= values[seen].mean(0)
        values[~seen] = 0
        return vector_table(corpus.item_keys, values.astype(np.float32))

    def transform(self, state: dict[str, Tensor], items: Items) -> np.ndarray:
        """M items -> [M, dim] float32."""
        return look_up(state, items.keys)[0]


def mutual_information(
    interactions: Interactions, train_lengths: Tensor, n_items: int, window: int
) -> "tuple[csr_matrix, np.ndarray]":
    """M [N, N] float32, the NEIGHBOURS largest entries of each row, and which items occur beside another, [N] bool.
    Memory holds M and the counts of one block of rows, never all counts."""
    from scipy.sparse import vstack

    training = in_training(interactions, train_lengths).numpy()
    items = interactions.items.numpy()[training]
    users = row_indices(interactions.offsets, len(interactions)).int().numpy()[training]
    occurs = np.zeros(n_items)
    for distance in range(1, window + 1):
        same = users[distance:] == users[:-distance]
        for side in (items[distance:], items[:-distance]):
            occurs += np.bincount(side[same], minlength=n_items) / distance
    smoothed, blocks = occurs**0.75, []
    for first, counts in cooccurrence_counts(items, users, n_items, window):
        rows = np.repeat(np.arange(counts.shape[0]), np.diff(counts.indptr))
        ratio = counts.data * smoothed.sum() / (occurs[first + rows] * smoothed[counts.indices]).clip(min=1e-9)
        counts.data = np.log(ratio.clip(min=1)).astype(np.float32)
        for start, end in zip(counts.indptr, counts.indptr[1:], strict=False):
            if end - start > NEIGHBOURS:
                entries = counts.data[start:end]
                entries[entries < np.partition(entries, -NEIGHBOURS)[-NEIGHBOURS]] = 0
        counts.eliminate_zeros()
        blocks.append(counts)
    return vstack(blocks, "csr"), occurs > 0


def sklearn_svd(matrix: "csr_matrix", dim: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `dim` left singular vectors of M [N, N] float32 and their values: [N, dim], [dim]."""
    from sklearn.utils.extmath import randomized_svd

    return randomized_svd(matrix, dim, n_oversamples=OVERSAMPLES, n_iter=ITERATIONS, random_state=0)[:2]


def torch_svd(matrix: "csr_matrix", dim: int, device: torch.device) -> tuple[np.ndarray, np.ndarray]:
    """As `sklearn_svd`, which is faster on a CPU."""
    entries = matrix.tocoo()
    places = torch.from_numpy(np.stack([entries.row, entries.col]))
    data = torch.from_numpy(entries.data)
    whole = torch.sparse_coo_tensor(places, data, matrix.shape, device=device, check_invariants=True).coalesce()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        left, singular, _ = torch.svd_lowrank(whole, min(dim + OVERSAMPLES, len(whole)), ITERATIONS)
    return left[:, :dim].cpu().numpy(), singular[:dim].cpu().numpy()


def cooccurrence_counts(
    items: np.ndarray, users: np.ndarray, n_items: int, window: int, block: int = 1_000_000
) -> "Iterator[tuple[int, csr_matrix]]":
    """Symmetric weighted counts of items within `window` interactions of a user, by blocks of rows.

    items, users: [T], those of a user in time order and together. Yields the first row and a scipy.sparse [R, N]
    float32 CSR matrix: entry (i, j) sums 1/w over the pairs of i and j at distance w. block: least number of
    interactions in a block.
    """
    from scipy.sparse import csr_matrix

    distances = np.array([*range(-window, 0), *range(1, window + 1)])
    weights = (1 / abs(distances)).astype(np.float32)
    order, ends = np.argsort(items, kind="stable"), np.bincount(items, minlength=n_items).cumsum()
    items, users = np.pad(items, window), np.pad(users, window, constant_values=-1)
    first = start = 0
    while first < n_items:
        last = min(int(np.searchsorted(ends, start + block)), n_items - 1)
        here = window + order[start : ends[last], None]  # [P, 1]
        near = here + distances  # [P, 2 * window]
        counted = np.where(users[near] == users[here], weights, np.float32(0))
        bounds = len(distances) * (np.append(start, ends[first : last + 1]) - start)
        entries = (counted.ravel(), items[near].ravel(), bounds)
        counts = csr_matrix(entries, shape=(last + 1 - first, n_items))
        counts.sum_duplicates()
        yield first, counts
        first, start = last + 1, ends[last]
