"""Which (user, position) pairs train, validate and test."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.schemas import Interactions, Samples
from ops.jagged import lengths_to_offsets, row_indices


@dataclass(frozen=True)
class Splits:
    """name: the rule that drew them. valid, test: prediction tasks.

    train_lengths: [U] int64, how many leading interactions of each user are training data.
    """

    name: str
    train_lengths: Tensor
    valid: Samples
    test: Samples


def leave_one_out(interactions: Interactions) -> Splits:
    """Each user's last interaction tests, the one before validates, each given all that came before it; the
    earlier ones are training data. Users with fewer than three interactions only train.
    """
    lengths = interactions.offsets.diff()
    evaluated = lengths >= 3
    train_lengths = torch.where(evaluated, lengths - 2, lengths)
    users = evaluated.nonzero().squeeze(1)
    fixed = torch.zeros_like(users)
    valid = Samples(users, lengths[users] - 2, fixed)
    test = Samples(users, lengths[users] - 1, fixed)
    return Splits("leave-one-out", train_lengths, valid, test)


def in_training(interactions: Interactions, train_lengths: Tensor) -> Tensor:
    """[T] bool: whether an interaction is training data. train_lengths: [U] int64."""
    users = row_indices(interactions.offsets, len(interactions))
    positions = torch.arange(len(interactions), device=users.device) - interactions.offsets[users]
    return positions < train_lengths[users]


def every_prefix(train_lengths: Tensor) -> Samples:
    """One sample for each training interaction but the first of each user."""
    users, positions = _enumerate((train_lengths - 1).clamp_min(0))
    return Samples(users, positions + 1, torch.zeros_like(users))


def windows(train_lengths: Tensor, max_items: int) -> Samples:
    """The training data of each user cut into windows of `max_items` targets, from the end backwards.

    Drawn with every position a target, they make each training interaction but the first of each user a target
    once; the slack lets windows of long users slide, so that their cuts fall elsewhere in every epoch.
    """
    targets = (train_lengths - 1).clamp_min(0)
    users, from_end = _enumerate((targets + max_items - 1) // max_items)
    last = targets[users]
    position = last - from_end * max_items
    return Samples(users, position, (last - position).clamp_max(max_items - 1))


def _enumerate(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each user u the numbers 0 to counts[u] - 1. Shape: [U] -> users [S], numbers [S]."""
    offsets = lengths_to_offsets(counts)
    users = row_indices(offsets, int(offsets[-1]))
    return users, torch.arange(len(users)) - offsets[users]
