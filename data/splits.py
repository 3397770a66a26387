"""Which (user, position) pairs train, validate and test."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import InstanceOf
from torch import Tensor

from common.parameters import PositiveShare, Seed, configurable
from common.schemas import Interactions, Samples
from ops.jagged import lengths_to_offsets, row_indices

SplitKind = Literal["leave-one-out", "temporal"]


@dataclass(frozen=True)
class Splits:
    """name: the rule that drew them. interactions: in the order that was split. valid, test: prediction tasks.
    train_lengths: [U] int64, how many leading interactions of each user are training data. cut: the time before which
    all of these lie, where there is one for all users."""

    name: str
    interactions: Interactions
    train_lengths: Tensor
    valid: Samples
    test: Samples
    cut: int | None = None


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
    return Splits("leave-one-out", interactions, train_lengths, valid, test)


@configurable
def temporal(
    interactions: InstanceOf[Interactions], valid_share: PositiveShare = 0.1, test_share: PositiveShare = 0.1
) -> Splits:
    """Two points in time, the same for all users, cut training data, validation and test (Meng et al. 2020).

    The last `test_share` of all interactions are later than the second cut or at it, the `valid_share` before them
    than the first. A user's task is their first interaction from a cut on, of validation before the second cut, given
    all that came before the cut; users without any before it have none. Whatever comes from the first cut on is no
    training data, also of users who are not evaluated.

    Raises ValueError where the interactions have no times, nothing is left to train on, or
    a cut leaves no task.
    """
    times, shares = interactions.timestamps, (1 - valid_share - test_share, valid_share, test_share)
    if times is None:
        raise ValueError("The temporal split needs timestamps, and this corpus has the order only: use leave-one-out.")
    if shares[0] <= 0:
        raise ValueError(f"temporal.valid_share = {valid_share} and test_share = {test_share} must have a sum below 1.")
    ends = [round((1 - share) * len(times)) for share in (valid_share + test_share, test_share)]
    cuts = [times.kthvalue(min(end + 1, len(times))).values for end in ends]
    users = row_indices(interactions.offsets, len(times))
    before = [torch.bincount(users[times < cut], minlength=interactions.n_users) for cut in cuts]  # 2 x [U]

    def tasks(position: Tensor, end: Tensor) -> Samples:
        chosen = ((position > 0) & (position < end)).nonzero().squeeze(1)
        return Samples(chosen, position[chosen], torch.zeros_like(chosen))

    valid, test = tasks(before[0], before[1]), tasks(before[1], interactions.offsets.diff())
    if not len(valid) or not len(test):
        raise ValueError(
            f"temporal.valid_share = {valid_share} and test_share = {test_share} leave no user to validate or test on: "
            "choose larger shares."
        )
    name = "temporal " + "/".join(f"{100 * share:.4g}" for share in shares) + " %"
    return Splits(name, interactions, before[0], valid, test, int(cuts[0]))


@configurable("split")
def draw_splits(kind: SplitKind, interactions: InstanceOf[Interactions], tie_seed: Seed | None = None) -> Splits:
    """kind: "leave-one-out", or "temporal" with the gin parameters of `temporal`.

    tie_seed: interactions of a user at the same time are split in a random order that this seed draws, and the name
    of the splits tells it; None: in the order of the source.
    Raises ValueError for a tie_seed where the interactions have no times.
    """
    draw = leave_one_out if kind == "leave-one-out" else temporal
    if tie_seed is None:
        return draw(interactions)
    splits = draw(shuffle_ties(interactions, tie_seed))
    return replace(splits, name=f"{splits.name} (tie seed {tie_seed})")


def shuffle_ties(interactions: Interactions, seed: int) -> Interactions:
    """The interactions of each user at the same time in a random order. ValueError where there are no times."""
    times = interactions.timestamps
    if times is None:
        raise ValueError(f"split.tie_seed = {seed} needs timestamps, and this corpus has the order only: leave it out.")
    users = row_indices(interactions.offsets, len(times))
    later = (users.diff() != 0) | (times.diff() != 0)  # than the one before
    moments = torch.cat([later.new_zeros(1), later]).cumsum(0)
    shuffled = torch.randperm(len(times), generator=torch.Generator().manual_seed(seed))
    order = shuffled[moments[shuffled].argsort(stable=True)]
    return replace(interactions, items=interactions.items[order])


def in_training(interactions: Interactions, train_lengths: Tensor) -> Tensor:
    """[T] bool: whether an interaction is training data. train_lengths: [U] int64."""
    lengths = interactions.offsets.diff()
    stretches = torch.stack([train_lengths, lengths - train_lengths], 1).flatten()  # of each user, in training and not
    known = torch.tensor([True, False], device=lengths.device).repeat(len(lengths))
    return known.repeat_interleave(stretches, output_size=len(interactions))


def every_prefix(train_lengths: Tensor) -> Samples:
    """One sample for each training interaction but the first of each user."""
    users, positions = _enumerate((train_lengths - 1).clamp_min(0))
    return Samples(users, positions + 1, torch.zeros_like(users))


def windows(train_lengths: Tensor, max_items: int) -> Samples:
    """The training data of each user cut into as few windows of up to `max_items` targets as there can be.

    Drawn with every position a target and one number for all windows of a user, they make each training interaction
    but the first of each user a target once. The cuts between windows lie max_items targets apart, and all move
    together, by as much as the first window lacks to be full.
    """
    targets = (train_lengths - 1).clamp_min(0)
    counts = (targets + max_items - 1) // max_items
    room = (counts * max_items - targets).where(counts > 1, 0)
    users, from_end = _enumerate(counts)
    slack = room[users]
    return Samples(users, targets[users] - from_end * max_items, torch.where(from_end == 0, -slack, slack))


def drawn(samples: Samples, index: Tensor, uniform: Tensor | None, max_items: int) -> tuple[Tensor, Tensor]:
    """Position and length of history of samples as they are drawn, [B] int64 both; no step waits for the device. index:
    [B] int64. max_items: longest history. uniform: [B] float64 in [0, 1), how far each sample goes in its slack: a
    positive one moves the position later, a negative one the start of the history; None leaves all in place."""
    position, slack = samples.position[index], samples.slack[index]
    shift = torch.zeros_like(slack) if uniform is None else (uniform * (slack.abs() + 1)).long()
    position = position + shift.where(slack > 0, 0)
    return position, position.clamp_max(max_items) - shift.where(slack < 0, 0)


def _enumerate(counts: Tensor) -> tuple[Tensor, Tensor]:
    """For each user u the numbers 0 to counts[u] - 1. Shape: [U] -> users [S], numbers [S]."""
    offsets = lengths_to_offsets(counts)
    users = row_indices(offsets, int(offsets[-1]))
    return users, torch.arange(len(users)) - offsets[users]
