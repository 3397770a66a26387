"""Item vectors from what users consumed close together in the training data."""

import hashlib
from dataclasses import asdict, dataclass

import gin
import numpy as np
from torch import Tensor

from data.corpus import Corpus
from data.items import Items, look_up, vector_table
from data.schemas import Interactions
from data.splits import in_training
from ops.jagged import row_indices


@gin.configurable
@dataclass(frozen=True)
class CoOccurrenceSvd:
    """Factorized positive pointwise mutual information of items within a window (Levy and Goldberg 2014).

    dim: D. window: largest distance of two interactions of a user that counts; a pair at distance w counts 1/w.

    M[i, j] = max(0, log(C[i, j] * sum_k C[k]^0.75 / (C[i] * C[j]^0.75))) with C the symmetric counts, and a row
    without index their sums; the vectors are U S^(1/2) of its truncated singular value decomposition, scaled to
    length 1 and centred over the items that occur. Items that the training data never shows get zeros.

    It tells the tokenizer which items are consumed together, which texts often don't: items with common
    consumers come to share code prefixes. It never reads a validation or test interaction. Fitted vectors are kept by
    item key; other items get zeros as well, the mean of the items that occur.
    """

    from_interactions = True
    dim: int = 128
    window: int = 5

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
        from scipy.sparse.linalg import svds

        if not 1 <= self.dim < corpus.n_items:
            raise ValueError(
                f"CoOccurrenceSvd.dim = {self.dim} does not fit {corpus.n_items} items: "
                f"the largest possible value is {corpus.n_items - 1}"
            )
        counts = cooccurrence_counts(corpus.interactions, train_lengths, corpus.n_items, self.window)
        occurs = np.asarray(counts.sum(1)).ravel()
        smoothed = occurs**0.75
        counts = counts.tocoo()
        ratio = counts.data * smoothed.sum() / (occurs[counts.row] * smoothed[counts.col])
        counts.data = np.maximum(np.log(ratio), 0)
        if not counts.data.any():
            raise ValueError(f"{self.identity} finds no items in the training data that go together")
        left, singular, _ = svds(counts.tocsr(), self.dim, v0=np.ones(corpus.n_items), return_singular_vectors="u")
        values = left * np.sqrt(singular)
        values /= np.linalg.norm(values, axis=1, keepdims=True).clip(min=1e-9)
        seen = occurs > 0
        values[seen] -= values[seen].mean(0)
        values[~seen] = 0
        return vector_table(corpus.item_keys, values.astype(np.float32))

    def transform(self, state: dict[str, Tensor], items: Items) -> np.ndarray:
        """M items -> [M, dim] float32."""
        return look_up(state, items.keys)[0]


def cooccurrence_counts(interactions: Interactions, train_lengths: Tensor, n_items: int, window: int):
    """Symmetric weighted counts of items within `window` interactions of a user's training data.

    Returns a scipy.sparse [N, N] float64 CSR matrix: entry (i, j) sums 1/w over the pairs at distance w.
    """
    from scipy.sparse import coo_matrix

    users = row_indices(interactions.offsets, len(interactions))
    training = in_training(interactions, train_lengths)
    items, total = interactions.items.numpy(), coo_matrix((n_items, n_items)).tocsr()
    for distance in range(1, window + 1):
        near = ((users[distance:] == users[:-distance]) & training[distance:]).numpy()
        pairs = (items[:-distance][near], items[distance:][near])
        total = total + coo_matrix((np.full(near.sum(), 1 / distance), pairs), shape=(n_items, n_items)).tocsr()
    return (total + total.T).tocsr()
