"""The operations on a depth of a tree whose nodes have vectors: a training step's and a search step's.

    python -m benchmarks.tree

Sizes of children are skewed, as those of learned catalogues are, and so are the nodes that targets and beams are at. On
a GPU they are timed as CUDA graphs with a cold L2 cache.
"""

import argparse
from collections.abc import Callable

import torch

from benchmarks.timing import heading, timed
from ops.tree import best_children, child_log_probs, tree_cross_entropy


def depth(nodes: int, mean: float, most: int, d: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors [n, d] and first_child [nodes + 1] of nodes with 1 to `most` children, about `mean` each."""
    counts = (-(mean - 1) * torch.rand(nodes).log()).long().clamp(max=most - 1) + 1
    counts[0] = most
    first_child = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
    return torch.randn(int(first_child[-1]), d).to(device), first_child.to(device)


def skewed(nodes: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return (torch.rand(shape, device=device) ** 2 * nodes).int()


def training(P: int, nodes: int, d: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    """Forward and backward of P targets below nodes with 1 to 300 children, 30 on average."""
    vectors, first_child = depth(nodes, 30, 300, d, device)
    vectors = vectors.to(dtype).requires_grad_()
    query = torch.randn(P, d, device=device).to(dtype).requires_grad_()
    parents = skewed(nodes, (P,), device)
    first, last = first_child[parents], first_child[parents + 1]
    targets = first + (torch.rand(P, device=device) * (last - first)).int()

    def step() -> tuple[torch.Tensor, ...]:
        losses = tree_cross_entropy(query, vectors, first_child, parents, targets, 300, 0.1)
        return torch.autograd.grad(losses.mean(), (query, vectors))

    return step


def search(users: int, beams: int, d: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable]:
    """The best children of each user's beams, at 256 nodes with 1 to 300 children, and their distributions alone."""
    vectors, first_child = depth(256, 47, 300, d, device)
    query, vectors = torch.randn(users, beams, d, device=device).to(dtype), vectors.to(dtype)
    scores, nodes = torch.randn(users, beams, device=device), skewed(256, (users, beams), device)
    return {
        "best children": lambda: best_children(query, scores, vectors, first_child, nodes, 300, beams),
        "distribution": lambda: child_log_probs(query, vectors, first_child, nodes, 300),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--width", type=int, nargs="+", default=[64, 256])
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.device == "cuda":
        heading()
    for dtype in (torch.float32, torch.bfloat16):
        for d in args.width:
            for P, nodes in ((2_000, 256), (2_000, 12_000), (40_000, 256)):
                show(f"{P:,} targets at {nodes:,} nodes", training(P, nodes, d, dtype, device), d, dtype, device)
            with torch.no_grad():
                for users in (512, 2048):
                    for name, step in search(users, 10, d, dtype, device).items():
                        show(f"{users} x 10 beams, {name}", step, d, dtype, device)


def show(name: str, step: Callable[[], object], d: int, dtype: torch.dtype, device: torch.device) -> None:
    times = " / ".join(f"{t:.1f}" for t in timed(step, device))
    print(f"  {name}, {d} wide, {dtype}: {times} us (p20 / p50 / p80)", flush=True)


if __name__ == "__main__":
    main()
