"""Operations inside a CUDA graph: replays read new inputs, and give the bits of a call."""

from collections.abc import Callable

import pytest
import torch

from modules.tree import Tree
from ops.cross_entropy import Seen, linear_cross_entropy
from ops.sums import RowSums, sum_rows, take_rows
from ops.tree import best_children, tree_cross_entropy

N, P, DIM = 900, 3000, 48

pytestmark = pytest.mark.gpu


def catalogue() -> Tree:
    numbers = torch.randperm(30 * 70)[:N]
    return Tree.build(torch.stack([numbers // 70, numbers % 70], 1)).to("cuda")


def check(step: Callable[[torch.Tensor], list[torch.Tensor]], draw: Callable[[], torch.Tensor]) -> None:
    place = draw()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(place)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(place)
    for _ in range(3):
        place.copy_(draw())
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(outputs, step(place), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_replay_of_training_gives_the_bits_of_a_call(dtype):
    tree, sums = catalogue(), RowSums.of(torch.randint(0, 200, (N, 3), device="cuda"))
    tables = [torch.randn(n, DIM, device="cuda", requires_grad=True) for n in (200, N)]
    weights, bias = torch.rand(P, device="cuda"), torch.tensor(-1.5, device="cuda", requires_grad=True)
    first = torch.arange(P, device="cuda") % (N - 20)
    seen = Seen(first, first + 20, torch.randperm(N, device="cuda"), bias)

    def step(items: torch.Tensor) -> list[torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            vectors = sum_rows(tables[0], sums)
            state, path = take_rows(vectors, items.roll(1)), tree.item_nodes[items]
            loss = linear_cross_entropy(state, vectors, items, weights, 0.1, seen)
            level = tree.first_child[1], path[:, 1], path[:, 2], tree.fanout[1]
            losses = tree_cross_entropy(state, tables[1], *level, 0.1)
        return [loss.detach(), losses.detach(), *torch.autograd.grad(loss + losses.mean(), [*tables, bias])]

    check(step, lambda: torch.randint(0, N, (P,), device="cuda"))


def test_a_replay_of_a_search_gives_the_bits_of_a_call():
    tree = catalogue()
    levels = [torch.randn(n, DIM, device="cuda") for n in tree.n_nodes]

    def step(query: torch.Tensor) -> list[torch.Tensor]:
        nodes, scores = torch.zeros(P, 1, dtype=torch.int32, device="cuda"), torch.zeros(P, 1, device="cuda")
        for depth, vectors in enumerate(levels):
            level = vectors, tree.first_child[depth], nodes, tree.fanout[depth]
            dead = (nodes[..., None] + torch.arange(tree.fanout[depth], device="cuda")) % 7 == 3
            scores, _, nodes = best_children(query, scores, *level, 10, dead)
        return [scores, nodes]

    check(step, lambda: torch.randn(P, 1, DIM, device="cuda"))
