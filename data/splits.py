"""Which (user, position) pairs train, validate and test."""

from dataclasses import dataclass

import torch
from torch import Tensor

from data.schemas import Interactions, Samples


@dataclass(frozen=True)
class Splits:
    """train, valid, test: prediction tasks; name: which rule drew them.

    train_lengths: [U] int64, how many leading interactions of each user are training data.
    """

    name: str
    train: Samples
    valid: Samples
    test: Samples
    train_lengths: Tensor


def leave_one_out(interactions: Interactions) -> Splits:
    """Each user's last interaction tests, the one before validates, all earlier ones train, each given what
    came before it. Users with fewer than three interactions only train. A first interaction has no history
    and is never a target.
    """
    lengths = interactions.offsets.diff()
    evaluated = lengths >= 3
    train_lengths = torch.where(evaluated, lengths - 2, lengths)
    users = evaluated.nonzero().squeeze(1)
    n_train = (train_lengths - 1).clamp_min(0)
    train_users = torch.repeat_interleave(torch.arange(len(lengths)), n_train)
    starts = torch.repeat_interleave(n_train.cumsum(0) - n_train, n_train)
    train_positions = torch.arange(len(train_users)) - starts + 1
    return Splits(
        "leave-one-out",
        Samples(train_users, train_positions),
        Samples(users, lengths[users] - 2),
        Samples(users, lengths[users] - 1),
        train_lengths,
    )
