"""The tree of a catalogue against one of dictionaries: prefix -> the items below it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.tree import MOST, Tree


@st.composite
def catalogues(draw) -> torch.Tensor:
    """Unique rows of codes, in any order."""
    levels, size = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    row = st.tuples(*[st.integers(0, size - 1)] * levels)
    return torch.tensor(draw(st.lists(row, min_size=1, max_size=25, unique=True)))


def by_prefix(codes: torch.Tensor) -> list[dict[tuple[int, ...], list[int]]]:
    """Of each depth, the items below each prefix, in lexicographic order both."""
    rows = [tuple(row) for row in codes.tolist()]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    depths = []
    for depth in range(codes.shape[1] + 1):
        depths.append({})
        for item in order:
            depths[-1].setdefault(rows[item][:depth], []).append(item)
    return depths


@settings(max_examples=60)
@given(catalogues())
def test_nodes_are_the_prefixes_and_children_those_one_code_longer(codes):
    tree, depths = Tree.build(codes), by_prefix(codes)
    assert (tree.n_levels, tree.n_items) == (codes.shape[1], len(codes))
    assert tree.n_nodes == [len(nodes) for nodes in depths[1:]]
    for depth, (above, below) in enumerate(zip(depths, depths[1:], strict=False)):
        parents, children = list(above), list(below)
        assert tree.code[depth].tolist() == [prefix[-1] for prefix in children]
        assert tree.parent[depth].tolist() == [parents.index(prefix[:-1]) for prefix in children]
        bounds = tree.first_child[depth].tolist()
        assert len(bounds) == len(parents) + 1
        for node, prefix in enumerate(parents):
            assert children[bounds[node] : bounds[node + 1]] == [c for c in children if c[:-1] == prefix]
        assert tree.fanout[depth] == max(b - a for a, b in zip(bounds, bounds[1:], strict=False))
    assert tree.level_sizes == tuple(codes.amax(0) + 1)


@settings(max_examples=60)
@given(catalogues())
def test_siblings_are_the_nodes_of_parents_with_several_children(codes):
    tree = Tree.build(codes)
    for depth in range(tree.n_levels):
        parents, families = tree.parent[depth].tolist(), {}
        for node, parent in enumerate(parents):
            families.setdefault(parent, []).append(node)
        families = [family for family in families.values() if len(family) > 1]
        nodes, offsets, parent = tree.siblings[depth]
        assert nodes.tolist() == sum(families, [])
        assert offsets.tolist() == [sum(map(len, families[:n])) for n in range(len(families) + 1)]
        assert parent.tolist() == [n for n, family in enumerate(families) for _ in family]


@settings(max_examples=60)
@given(catalogues())
def test_few_items_lie_below_a_node_with_more_than_the_usual_children(codes):
    tree = Tree.build(codes)
    for depth, usual in enumerate(tree.usual_fanout):
        children = [int(tree.first_child[depth].diff()[path[depth]]) for path in tree.item_nodes.tolist()]
        assert usual in children
        assert sum(count <= usual for count in children) >= MOST * len(children)
        assert sum(count < usual for count in children) < MOST * len(children)


@settings(max_examples=60)
@given(catalogues())
def test_leaves_are_the_items(codes):
    tree, depths = Tree.build(codes), by_prefix(codes)
    leaves = tree.leaf_items.tolist()
    for depth, nodes in enumerate(depths):
        bounds = tree.first_leaf[depth].tolist()
        assert [leaves[a:b] for a, b in zip(bounds, bounds[1:], strict=False)] == list(nodes.values())
        for node, items in enumerate(nodes.values()):
            assert tree.item_nodes[items, depth].tolist() == [node] * len(items)
    arrays = [*tree.first_child, *tree.parent, *tree.code, *tree.first_leaf, tree.leaf_items, tree.item_nodes]
    assert {array.dtype for array in arrays} == {torch.int32}


@settings(max_examples=30)
@given(catalogues(), st.sampled_from([torch.float16, torch.float32, torch.float64]))
def test_means_are_over_the_items_below_a_node(codes, dtype):
    tree, values = Tree.build(codes), torch.randn(len(codes), 3).to(dtype)
    for depth, nodes in enumerate(by_prefix(codes)):
        means = tree.node_means(depth, values)
        assert means.dtype == torch.promote_types(dtype, torch.float32)
        expected = torch.stack([values[items].double().mean(0) for items in nodes.values()])
        torch.testing.assert_close(means.double(), expected, rtol=1e-5, atol=1e-6)


@settings(max_examples=60)
@given(st.data())
def test_the_nodes_of_another_tree_are_found_by_prefix(data):
    levels = data.draw(st.integers(1, 4))
    row = st.tuples(*[st.integers(0, 4)] * levels)
    one, other = (torch.tensor(data.draw(st.lists(row, min_size=1, max_size=25, unique=True))) for _ in range(2))
    found = Tree.build(one).nodes_of(Tree.build(other))
    for nodes, own, theirs in zip(found, by_prefix(one)[1:], by_prefix(other)[1:], strict=True):
        number = {prefix: n for n, prefix in enumerate(own)}
        assert nodes.tolist() == [number.get(prefix, -1) for prefix in theirs]


def test_level_sizes_may_exceed_the_codes_in_use():
    assert Tree.build(torch.tensor([[0, 3], [1, 0]]), (256, 256)).level_sizes == (256, 256)


def test_items_with_equal_codes_are_named():
    codes = torch.tensor([[1, 2], [0, 5], [1, 3], [0, 5]])
    with pytest.raises(ValueError, match=r"Items 1 and 3 share the codes \[0, 5\]"):
        Tree.build(codes)


@settings(max_examples=30)
@given(catalogues(), st.data())
def test_the_digest_tells_the_codes_of_every_item(codes, data):
    digest = Tree.build(codes).digest
    assert len(digest) == 16 and int(digest, 16) >= 0
    assert Tree.build(codes.int(), (9,) * codes.shape[1]).to("cpu").digest == digest
    shuffled = codes[data.draw(st.permutations(range(len(codes))))]
    changed = codes.clone()
    changed[data.draw(st.integers(0, len(codes) - 1)), data.draw(st.integers(0, codes.shape[1] - 1))] += 5
    for other in (shuffled, changed):
        assert (Tree.build(other).digest == digest) == torch.equal(other, codes)
