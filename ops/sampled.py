"""Cross-entropy by a sample of the logits, where a catalogue has too many vectors to make them all."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ops.jagged import JaggedTensor, jagged_to_padded, padded_to_jagged, row_indices


@dataclass(frozen=True)
class RowItems:
    """What is in the sample of all targets of a row: items [B, L] integers, none twice in a row, negative for no item,
    and their vectors [B, L, d]. Added to logits: bias [P, L] to theirs, target_bias [P] to the targets'."""

    items: Tensor
    vectors: Tensor
    bias: Tensor
    target_bias: Tensor


def sampled_cross_entropy(
    x: JaggedTensor, take: Callable[[Tensor], Tensor], targets: Tensor, drawn: Tensor, drawn_below: Tensor, size: int,
    own: RowItems,
) -> Tensor:  # fmt: skip
    """`sampled_losses` of targets among N vectors, of which those of the target's row are known, and one sample of
    `size` stands for all others.

    take: makes vectors, index [T] -> [T, d]. drawn, drawn_below: [N] float64, with what probability each is drawn, and
    their cumulative sums. Shape: x B rows of [P, d], targets [P] int64 -> [P].
    """
    P, rows = len(targets), row_indices(x.offsets, len(targets))
    uniform = torch.rand(size, dtype=torch.float64, device=targets.device) * drawn_below[-1]
    others = torch.searchsorted(drawn_below, uniform).clamp_max(len(drawn_below) - 1)
    mine, theirs = take(torch.cat([targets, others])).split([P, size])  # at once: one gradient of a table
    queries = jagged_to_padded(x.values, x.offsets, x.max_length)  # [B, T, d]
    known = padded_to_jagged(queries @ own.vectors.mT.to(x.values.dtype), x.offsets, P)  # [P, L]
    logits = torch.cat([known + own.bias, x.values @ theirs.T.to(x.values.dtype)], 1)
    is_target = [items == targets[:, None] for items in (own.items[rows], others)]
    left_out = torch.cat([own.items < 0, _occur(others, own.items)], 1)[rows] | torch.cat(is_target, 1)
    expected = torch.cat([drawn.new_ones(own.items.shape[1]), drawn[others] * size])
    return sampled_losses((x.values * mine).sum(1) + own.target_bias, logits, expected.log(), left_out)


def _occur(items: Tensor, rows: Tensor) -> Tensor:
    """Which of S items occur in each row: items [S], rows [B, L] integers -> [B, S] bool."""
    ordered = items.sort().values
    place = torch.searchsorted(ordered, rows).clamp_max(len(ordered) - 1)  # of the first of equal ones
    place = place.masked_fill(ordered[place] != rows, len(ordered))
    found = torch.zeros(len(rows), len(ordered) + 1, dtype=torch.bool, device=rows.device).scatter_(1, place, True)
    return found[:, torch.searchsorted(ordered, items)]


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
