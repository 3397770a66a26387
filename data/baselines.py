"""Two trivial recommenders: the first bar for any model on the same splits."""

import torch
from torch import Tensor

from common.schemas import Interactions
from data.splits import in_training
from ops.jagged import row_indices


class MostPopular:
    """Ranks the items by how often they occur in the training interactions, the same for everyone. train_lengths: [U]
    int64, how many leading interactions of each user are training data. Ties go to the smaller item id."""

    def __init__(self, interactions: Interactions, train_lengths: Tensor, n_items: int) -> None:
        items = interactions.items[in_training(interactions, train_lengths)].long()
        counts = torch.bincount(items, minlength=n_items)
        self.order = counts.argsort(descending=True, stable=True)  # [N]
        self._places = self.order.argsort()

    def places(self, last_items: Tensor, items: Tensor) -> Tensor:
        """Place, from 0, of each item in the ranking of a user with that last item. Shape: [M], [M] -> [M] int64."""
        return self._places[items]


class Transition:
    """Ranks the items by how often they directly followed the user's last item in training, then the most popular.
    Arguments as of `MostPopular`; ties go to the smaller item id among both. No item appears twice."""

    def __init__(self, interactions: Interactions, train_lengths: Tensor, n_items: int) -> None:
        self.popular, self.n_items = MostPopular(interactions, train_lengths, n_items), n_items
        users = row_indices(interactions.offsets, len(interactions))
        follows = in_training(interactions, train_lengths)[1:] & (users[1:] == users[:-1])
        items = interactions.items.long()
        pairs, counts = torch.unique((items[:-1] * n_items + items[1:])[follows], return_counts=True)
        owner, follower = pairs // n_items, pairs % n_items  # [P], owner ascending
        self._starts = torch.searchsorted(owner, torch.arange(n_items + 1))  # of each item's followers
        by_count = counts.argsort(descending=True, stable=True)
        best_first = by_count[owner[by_count].argsort(stable=True)]
        end = torch.tensor([n_items**2])  # past every pair, so that a search always ends at one
        self._pairs = torch.cat([pairs, end])
        self._places = torch.zeros_like(self._pairs)  # of a pair's follower among those of its owner
        self._places[best_first] = torch.arange(len(pairs)) - self._starts[owner]
        self._popularity = (owner * n_items + self.popular.places(owner, follower)).sort().values

    def places(self, last_items: Tensor, items: Tensor) -> Tensor:
        """As `MostPopular.places`."""
        row = last_items * self.n_items
        pair = torch.searchsorted(self._pairs, row + items)
        popular = self.popular.places(last_items, items)
        first, end = self._starts[last_items], self._starts[last_items + 1]
        followers_before = torch.searchsorted(self._popularity, row + popular) - first  # more popular than the item
        behind = end - first + popular - followers_before
        return torch.where(self._pairs[pair] == row + items, self._places[pair], behind)
