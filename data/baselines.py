"""Two trivial recommenders: the first bar for any model on the same splits."""

import torch
from torch import Tensor

from data.schemas import Interactions
from data.splits import in_training
from ops.jagged import row_indices


class MostPopular:
    """Ranks the items by how often they occur in the training interactions, the same for everyone.

    train_lengths: [U] int64, how many leading interactions of each user are training data.
    Ties go to the smaller item id.
    """

    def __init__(self, interactions: Interactions, train_lengths: Tensor, n_items: int) -> None:
        items = interactions.items[in_training(interactions, train_lengths)].long()
        counts = torch.bincount(items, minlength=n_items)
        self.order = counts.sort(descending=True, stable=True).indices  # [N]

    def rank(self, last_items: Tensor, k: int) -> Tensor:
        """The k best items for each of B users, best first.

        Shape: last_items [B] int64, each user's last item -> [B, k] int64.
        Raises ValueError where there are fewer than k items.
        """
        if not 1 <= k <= len(self.order):
            raise ValueError(f"k must be 1 to {len(self.order)}, the number of items, not {k}")
        return self.order[:k].repeat(len(last_items), 1)


class Transition:
    """Ranks the items by how often they directly followed the user's last item in training.

    The list is filled up with the most popular. Arguments as of `MostPopular`; ties go to the smaller item id
    among both. No item appears twice.
    """

    def __init__(self, interactions: Interactions, train_lengths: Tensor, n_items: int) -> None:
        self.popular = MostPopular(interactions, train_lengths, n_items)
        users = row_indices(interactions.offsets, len(interactions))
        follows = in_training(interactions, train_lengths)[1:] & (users[1:] == users[:-1])
        items = interactions.items.long()
        pairs, counts = torch.unique((items[:-1] * n_items + items[1:])[follows], return_counts=True)
        self.pairs, self.n_items = pairs, n_items  # item * N + follower, ascending
        by_count = counts.sort(descending=True, stable=True).indices
        pairs = pairs[by_count]
        pairs = pairs[(pairs // n_items).sort(stable=True).indices]
        self.followers = pairs % n_items  # [P], those of item i at offsets[i] to offsets[i + 1], best first
        self.offsets = torch.searchsorted(pairs // n_items, torch.arange(n_items + 1, device=pairs.device))

    def rank(self, last_items: Tensor, k: int) -> Tensor:
        """As `MostPopular.rank`."""
        popular = self.popular.rank(last_items, k)  # [B, k]
        if len(self.followers) == 0:
            return popular
        places = self.offsets[last_items, None] + torch.arange(k, device=last_items.device)  # [B, k]
        known = places < self.offsets[last_items + 1, None]
        followers = self.followers[places.clamp(max=len(self.followers) - 1)].where(known, -1)
        wanted = last_items[:, None] * self.n_items + popular
        found = torch.searchsorted(self.pairs, wanted).clamp(max=len(self.pairs) - 1)
        fresh = self.pairs[found] != wanted  # popular items that are not followers
        first = torch.cat([known, fresh], dim=1).sort(dim=1, descending=True, stable=True).indices[:, :k]
        return torch.cat([followers, popular], dim=1).gather(1, first)
