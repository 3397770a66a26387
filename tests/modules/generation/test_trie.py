"""The trie against dictionaries of prefixes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.generation.trie import Trie

codes_strategy = st.integers(1, 4).flatmap(
    lambda levels: st.sets(st.tuples(*[st.integers(0, 4)] * levels), min_size=1, max_size=30)
)


def prefixes(rows: list[tuple[int, ...]], depth: int) -> list[tuple[int, ...]]:
    """Distinct prefixes in lexicographic order: the n-th is node n of that depth."""
    return sorted({row[:depth] for row in rows})


@settings(deadline=None, max_examples=40)
@given(codes_strategy, st.randoms(use_true_random=False))
def test_nodes_and_children_are_the_prefixes(codes, random):
    rows = sorted(codes)
    random.shuffle(rows)
    trie = Trie.build(torch.tensor(rows))
    assert (trie.n_items, trie.n_levels) == (len(rows), len(rows[0]))
    assert trie.item_codes.tolist() == [list(row) for row in rows]
    assert [rows[item] for item in trie.leaf_items.tolist()] == sorted(rows)
    for depth in range(trie.n_levels):
        parents, below = prefixes(rows, depth), prefixes(rows, depth + 1)
        children = {parent: [child for child in below if child[:depth] == parent] for parent in parents}
        assert trie.fanout[depth] == max(map(len, children.values()))
        assert trie.code[depth].tolist() == [child[-1] for child in below]
        nodes = trie.child(depth, torch.arange(len(parents))[:, None], torch.arange(trie.fanout[depth]))
        assert nodes.dtype == torch.int32
        for parent, row in zip(parents, nodes.tolist(), strict=True):
            found, absent = children[parent], trie.fanout[depth] - len(children[parent])
            assert [below[node] for node in row] == found + found[-1:] * absent
    paths = [[prefixes(rows, depth).index(row[:depth]) for depth in range(trie.n_levels + 1)] for row in rows]
    assert trie.item_nodes.tolist() == paths


def test_codes_take_as_little_memory_as_their_size_allows():
    codes = torch.tensor([[255, 256, 40_000], [3, 32_767, 32_768]])
    trie = Trie.build(codes)
    assert [code.dtype for code in trie.code] == [torch.uint8, torch.int16, torch.int32]
    assert [code.tolist() for code in trie.code] == codes.flip(0).T.tolist()


@settings(deadline=None, max_examples=25)
@given(codes_strategy, st.integers(0, 1000))
def test_log_probs_are_a_distribution_over_the_items(codes, seed):
    """The product over the levels, summed over all items, is 1; each factor is a softmax over sibling codes."""
    rows = list(codes)
    trie = Trie.build(torch.tensor(rows))
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(len(rows), dtype=torch.float64)
    for depth in range(trie.n_levels):
        n_nodes = len(prefixes(rows, depth))
        logits = 4 * torch.randn(n_nodes, 5, generator=generator)
        log_probs = trie.log_probs(logits, depth, torch.arange(n_nodes))
        assert log_probs.dtype == torch.float32
        torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(n_nodes))
        for item, row in enumerate(rows):
            node = prefixes(rows, depth).index(row[:depth])
            siblings = sorted({other[depth] for other in rows if other[:depth] == row[:depth]})
            expected = logits[node][siblings].double().log_softmax(0)[siblings.index(row[depth])]
            total[item] += expected
            assert float(log_probs[node, siblings.index(row[depth])]) == pytest.approx(float(expected), abs=1e-5)
            assert int(log_probs[node].isfinite().sum()) == len(siblings)
            loss = trie.cross_entropy(
                logits[[node]], depth, torch.tensor([node]), trie.item_nodes[item, depth + 1, None]
            )
            assert loss.dtype == torch.float32 and float(loss) == pytest.approx(-float(expected), abs=1e-5)
    assert float(total.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_leading_dimensions_of_nodes_stay():
    trie = Trie.build(torch.tensor([[0, 1], [2, 0], [2, 3]]))
    nodes = torch.tensor([[0, 1], [1, 1], [0, 0]])
    log_probs = trie.log_probs(torch.zeros(3, 2, 4, dtype=torch.bfloat16), 1, nodes)
    assert trie.child(1, nodes, nodes).tolist() == [[0, 2], [2, 2], [0, 0]]
    ends = [0, float("-inf")], pytest.approx([-0.693147] * 2)
    assert log_probs.tolist() == [list(ends), [ends[1]] * 2, [ends[0]] * 2]


def test_codes_that_continue_no_item_get_no_gradient():
    trie = Trie.build(torch.tensor([[0, 1], [2, 0], [2, 3]]))
    logits = torch.randn(1, 4, requires_grad=True)
    trie.log_probs(logits, 1, torch.tensor([1]))[0, 0].backward()
    assert logits.grad[0, 1] == logits.grad[0, 2] == 0 and bool(logits.grad[0, [0, 3]].all())


def test_one_item_is_certain():
    trie = Trie.build(torch.tensor([[3, 0, 2]]))
    assert trie.fanout == [1, 1, 1] and trie.leaf_items.tolist() == [0]
    for depth in range(3):
        assert trie.log_probs(torch.randn(1, 4), depth, torch.tensor([0])).tolist() == [[0]]
        assert trie.child(depth, torch.tensor([0]), torch.tensor([0])).tolist() == [0]


def test_items_with_equal_codes_are_refused():
    codes = torch.tensor([[1, 2], [0, 2], [3, 3], [0, 2], [1, 1]])
    with pytest.raises(ValueError, match=r"Items 1 and 3 share the codes \[0, 2\]"):
        Trie.build(codes)


def test_the_search_may_move_to_another_device():
    trie = Trie.build(torch.tensor([[0, 1], [2, 0]])).to("meta")
    tensors = [*trie.first_child, *trie.code, trie.leaf_items, trie.item_codes, trie.item_nodes]
    assert {tensor.device.type for tensor in tensors} == {"meta"} and trie.fanout == [2, 1]
