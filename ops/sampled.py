"""Cross-entropy by a sample of the logits, where a catalogue has too many vectors to make them all."""

from collections.abc import Callable

import torch
from torch import Tensor


def sampled_cross_entropy(
    x: Tensor, take: Callable[[Tensor], Tensor], targets: Tensor, drawn: Tensor, drawn_below: Tensor, size: int
) -> Tensor:
    """`sampled_losses` of targets among N vectors, of which one sample of `size` stands for all others.

    take: makes vectors, index [T] -> [T, d]. drawn, drawn_below: [N] float64, with what probability each is drawn, and
    their cumulative sums. Shape: x [P, d], targets [P] int64 -> [P].
    """
    uniform = torch.rand(size, dtype=torch.float64, device=targets.device) * drawn_below[-1]
    others = torch.searchsorted(drawn_below, uniform).clamp_max(len(drawn_below) - 1)
    mine, theirs = take(torch.cat([targets, others])).split([len(targets), size])  # at once: one gradient of a table
    own = (x * mine).sum(1)
    logits = x @ theirs.T.to(x.dtype)  # [P, size]
    return sampled_losses(own, logits, (drawn[others] * size).log(), others == targets[:, None])


def sampled_tree_cross_entropy(
    query: Tensor, take: Callable[[Tensor], Tensor], first_child: Tensor, parents: Tensor, targets: Tensor, fanout: int,
    size: int,
) -> Tensor:  # fmt: skip
    """As `ops.tree.tree_cross_entropy`, by all children of a target's parent where they are no more than `size`,
    otherwise by that many drawn ones. take: makes vectors, index [T] -> [T, d]. Shape: see there."""
    first, count = first_child[parents].long()[:, None], first_child.diff()[parents][:, None]
    place = torch.arange(min(fanout, size), device=query.device).expand(len(query), -1)
    expected = torch.zeros_like(count)
    if fanout > size:
        drawn = (torch.rand(len(query), size, device=query.device) * count).long()
        place, expected = torch.where(count > size, drawn, place), (size / count).log().clamp_max(0)
    children = first + torch.minimum(place, count - 1)
    mine, theirs = take(torch.cat([targets, children.flatten()])).split([len(targets), children.numel()])
    own = (query * mine).sum(1)
    logits = torch.bmm(theirs.unflatten(0, children.shape).to(query.dtype), query[:, :, None]).squeeze(2)  # [P, S]
    return sampled_losses(own, logits, expected, (place >= count) | (children == targets[:, None]))


def sampled_losses(own: Tensor, others: Tensor, log_expected: Tensor, left_out: Tensor) -> Tensor:
    """-log of a softmax of which some logits are known: its own, and those of a sample of the others.

    loss[p] = log(exp(own[p]) + sum over s of exp(others[p, s]) / expected[p, s]) - own[p], s not left out, where
    expected is how often the sample was to hold that other: the sum estimates that over all others without bias
    (Bengio and Senecal 2008; Yi et al. 2019, equation 3, where the own logit is no part of the sample).

    Shape: own [P], others [P, S], log_expected and left_out broadcast to it -> [P], in float32 or wider.
    """
    dtype = torch.promote_types(own.dtype, torch.float32)
    logits = (others.to(dtype) - log_expected.to(dtype)).masked_fill(left_out, float("-inf"))
    own = own.to(dtype)
    return torch.cat([own[:, None], logits], 1).logsumexp(1) - own
