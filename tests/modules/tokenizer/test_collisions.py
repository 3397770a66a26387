"""Items with the same codes told apart on the last level, against one item at a time."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.tokenizer.collisions import colliding_items, number_groups, resolve_collisions


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 10_000))
def test_each_item_in_turn_takes_its_best_free_code(n, levels, size, n_candidates, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, size, (n, levels), generator=generator)
    distance = torch.randint(0, 4, (n,), generator=generator).double()
    items = colliding_items(codes, distance)
    rows = codes.tolist()
    keeper = {}  # codes -> the nearest of their items, the first of equally near ones
    for item, row in enumerate(map(tuple, rows)):
        if row not in keeper or distance[item] < distance[keeper[row]]:
            keeper[row] = item
    assert set(items.tolist()) == set(range(n)) - set(keeper.values())
    assert items.tolist() == sorted(items.tolist(), key=lambda item: (float(distance[item]), item))

    orders = torch.rand(len(items), size, generator=generator).argsort(1)
    candidates = orders[:, :n_candidates].to(torch.int32)
    expected, taken, waiting = [list(row) for row in rows], set(map(tuple, rows)), items.tolist()
    for k in range(candidates.shape[1]):
        for item in list(waiting):
            wish = (*expected[item][:-1], int(candidates[items.tolist().index(item), k]))
            if wish not in taken:
                taken.add(wish)
                expected[item] = list(wish)
                waiting.remove(item)
    assert resolve_collisions(codes, items, candidates, size).tolist() == expected
    if n_candidates >= size and n <= size:
        assert len(set(map(tuple, expected))) == n, "where codes suffice everybody gets one"


def test_groups_are_numbered_in_order():
    codes = torch.tensor([[2, 1], [0, 3], [2, 1], [0, 1]])
    assert number_groups(codes).tolist() == [2, 1, 2, 0]
