"""Batches drawn and seeds derived, by their rules."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.shuffle import Shuffler, derive_seed


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.integers(1, 100), st.integers(1, 120))
def test_an_epoch_repeats_nothing_and_leaves_out_less_than_a_batch(seed, n, batch_size):
    shuffler = Shuffler(n, batch_size, seed)
    size = min(batch_size, n)
    for epoch in range(2):
        steps = range(epoch * (n // size), (epoch + 1) * (n // size))
        draws = [shuffler.draw(step) for step in steps]
        for index, uniform in draws:
            assert index.shape == uniform.shape == (size,)
            assert index.dtype == torch.int64 and uniform.dtype == torch.float64
            assert 0 <= float(uniform.min()) and float(uniform.max()) < 1
        drawn = torch.cat([index for index, _ in draws]).tolist()
        assert len(set(drawn)) == len(drawn) > n - size and set(drawn) <= set(range(n))


@settings(max_examples=25)
@given(st.integers(1, 50), st.integers(1, 60), st.lists(st.integers(0, 200), min_size=1, max_size=9))
def test_a_draw_depends_on_the_step_alone(n, batch_size, steps):
    used = Shuffler(n, batch_size, seed=7)
    for step in steps:  # in any order, with repetitions
        for mine, fresh in zip(used.draw(step), Shuffler(n, batch_size, seed=7).draw(step), strict=True):
            assert torch.equal(mine, fresh)


def test_epochs_steps_and_seeds_differ():
    shuffler = Shuffler(1000, 100, seed=0)
    assert not torch.equal(shuffler.draw(0)[0], shuffler.draw(10)[0])  # the first batches of two epochs
    assert not torch.equal(shuffler.draw(0)[1], shuffler.draw(1)[1])
    assert not torch.equal(shuffler.draw(0)[1], shuffler.draw(10)[1])
    assert not torch.equal(shuffler.draw(0)[0], Shuffler(1000, 100, seed=1).draw(0)[0])
    assert not torch.equal(shuffler.draw(0)[1], Shuffler(1000, 100, seed=1).draw(0)[1])
    epoch = torch.cat([shuffler.draw(step)[0] for step in range(10)])
    assert epoch.sort().values.tolist() == list(range(1000)) and epoch.tolist() != list(range(1000))


def test_a_group_shares_one_number_in_an_epoch():
    groups = torch.tensor([3, 0, 0, 2, 3, 3])
    shuffler, seen = Shuffler(6, 2, 0, groups), set()
    for epoch in range(3):
        numbers = {}
        for step in range(3 * epoch, 3 * epoch + 3):
            for index, uniform in zip(*(part.tolist() for part in shuffler.draw(step)), strict=True):
                numbers.setdefault(int(groups[index]), set()).add(uniform)
        assert {group: len(values) for group, values in numbers.items()} == {0: 1, 2: 1, 3: 1}
        seen |= {value for values in numbers.values() for value in values}
    assert len(seen) == 9


@pytest.mark.parametrize(("n", "batch_size"), [(0, 4), (4, 0)])
def test_nothing_to_draw_is_refused(n, batch_size):
    with pytest.raises(ValueError, match=f"batches of {batch_size} from {n} training samples"):
        Shuffler(n, batch_size, seed=0)


def test_derived_seeds_tell_their_parts_apart():
    parts = [
        (1, 11),
        (11, 1),
        (0, "epoch", 1),
        (0, "epoch", 11),
        (0, "step", 1),
        (1, "epoch", 1),
        (10, "epoch", 1),
        (0,),
        (1,),
    ]
    assert len({derive_seed(*part) for part in parts}) == len(parts)
    for part in parts:
        torch.Generator().manual_seed(derive_seed(*part))  # fits
