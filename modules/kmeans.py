"""k-means, for the initial codebooks: k-means++ seeding (Arthur and Vassilvitskii 2007) and Lloyd's iterations."""

import torch
from torch import Tensor

from ops.precision import matmul_precision


def squared_distances(x: Tensor, centroids: Tensor) -> Tensor:
    """x [N, D], centroids [K, D] -> [N, K], in the dtype of x and never below zero."""
    # In half precision and in TF32 the difference would be noise.
    with torch.autocast(x.device.type, enabled=False), matmul_precision("highest"):
        products = x @ centroids.T
    return (x.square().sum(1, keepdim=True) - 2 * products + centroids.square().sum(1)).clamp_min_(0)


def plus_plus(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k rows of x, each drawn with probability proportional to its squared distance to those before it."""
    first = torch.randint(len(x), (1,), generator=generator, device=x.device)
    centroids = x.new_empty(k, x.shape[1])
    centroids[0] = x[first[0]]
    nearest = (x - centroids[0]).square().sum(1)  # [N]
    for i in range(1, k):
        # Where every row already coincides with a centroid, any row will do.
        weights = torch.where(nearest.sum() > 0, nearest, torch.ones_like(nearest))
        edges = weights.double().cumsum(0)
        draw = torch.rand(1, generator=generator, device=x.device, dtype=torch.float64) * edges[-1]
        index = torch.searchsorted(edges, draw, right=True).clamp_max(len(x) - 1)
        centroids[i] = x[index[0]]
        nearest = torch.minimum(nearest, (x - centroids[i]).square().sum(1))
    return centroids


@torch.no_grad()
def kmeans(x: Tensor, k: int, generator: torch.Generator, iterations: int = 20) -> Tensor:
    """The centroids [k, D] of k groups of x [N, D]. A group that empties restarts at the row farthest from its own.
    generator: on the device of x. ValueError where N < k."""
    if len(x) < k:
        raise ValueError(f"k-means of {k} centroids needs at least {k} rows; there are {len(x)}.")
    centroids = plus_plus(x, k, generator)
    for _ in range(iterations):
        distance, assignment = squared_distances(x, centroids).min(1)
        counts = torch.bincount(assignment, minlength=k)
        sums = torch.zeros_like(centroids).index_add_(0, assignment, x)
        farthest = x[distance.topk(k).indices]
        empty = counts == 0
        order = (empty.cumsum(0) - 1).clamp_min(0)  # the i-th empty group takes the i-th farthest row
        centroids = torch.where(empty[:, None], farthest[order], sums / counts.clamp_min(1)[:, None])
    return centroids
