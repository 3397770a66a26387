"""The trie over many items: time to build, bytes an item, and what a masking step costs on each level.

    python -m benchmarks.trie

A masking step is the choice of the best children of all beams of a user, with their scores and nodes; also timed: the
distribution over the children alone and, on a GPU, the step made of it and `torch.topk`, which on a CPU is the step.
On a GPU they are timed as CUDA graphs with a cold L2 cache. The cost follows the widest node of a level, which in
random catalogues grows with the items; "equally wide" ones have one node of 256 children on each level, whatever their
size.
"""

import argparse
import time
from collections.abc import Callable

import torch

from modules.generation.trie import Trie
from ops import reference


def random_codes(n: int, device: torch.device, wide: bool) -> torch.Tensor:
    """n distinct tuples of four codes of 256, in no order. wide: one node of each level has all 256 children."""
    generator = torch.Generator().manual_seed(0)
    shifts = torch.tensor([0, 8, 16, 24])
    path = (torch.arange(256)[:, None] << shifts).flatten().unique() if wide else torch.empty(0, dtype=torch.int64)
    numbers = torch.randint(0, 2**32, (n + n // 8 + 1000,), generator=generator).unique()
    numbers = numbers[~torch.isin(numbers, path)]
    numbers = torch.cat([path, numbers[torch.randperm(len(numbers), generator=generator)]])[:n]
    numbers = numbers[torch.randperm(n, generator=generator)].to(device)
    return torch.stack([numbers >> shift & 255 for shift in (24, 16, 8, 0)], 1).to(torch.int32)


def size(trie: Trie) -> float:
    """Bytes an item."""
    tensors = [*trie.first_child, *trie.code, trie.leaf_items, trie.item_codes, trie.item_nodes]
    return sum(tensor.nbytes for tensor in tensors) / trie.n_items


def clock(function, device: torch.device, repeats: int) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantiles of the time of a call, in microseconds, the host's part included."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(1e6 * (time.perf_counter() - start))
    return tuple(torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist())


def steps(trie: Trie, level: int, users: int, beams: int) -> dict[str, Callable[[], object]]:
    """What is timed of one level."""
    device = trie.leaf_items.device
    logits = torch.randn(users, beams, 256, device=device)
    scores = torch.randn(users, beams, device=device)
    nodes = trie.item_nodes[torch.randint(0, trie.n_items, (users, beams), device=device), level]

    def distribution() -> torch.Tensor:
        return trie.log_probs(logits, level, nodes)

    first_child = trie.first_child[level]
    made = {
        "masking step": lambda: trie.best_children(logits, scores, level, nodes, beams),
        "distribution": distribution,
    }
    if device.type == "cuda":
        made["with torch.topk"] = lambda: reference.best_children(
            distribution(), scores, first_child, nodes, beams, None
        )
    return made


def timed(step: Callable[[], object], device: torch.device) -> tuple[float, float, float]:
    """Quantiles in microseconds."""
    step()
    if device.type == "cpu":
        return clock(step, device, 15)
    from benchmarks.timing import quantiles, replayed

    return quantiles(replayed(step))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--users", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--beams", type=int, default=10)
    args = parser.parse_args()
    device = torch.device(args.device)
    if args.device == "cuda":
        from benchmarks.timing import heading

        heading()
    for n in args.items:
        for wide in (False, True):
            codes = random_codes(n, device, wide)
            build = clock(lambda codes=codes: Trie.build(codes), device, 3)[1] / 1e6
            trie = Trie.build(codes)
            print(
                f"{device}: {n:,} items{', equally wide' if wide else ''}: built in {build:.2f} s, {size(trie):.1f} "
                f"bytes an item, fanout {trie.fanout}"
            )
            for users in args.users:
                show(trie, users, args.beams)


def show(trie: Trie, users: int, beams: int) -> None:
    """A line of each."""
    device = trie.leaf_items.device
    levels = [steps(trie, level, users, beams) for level in range(trie.n_levels)]
    for name in levels[0]:
        times = [timed(level[name], device) for level in levels]
        each = ", ".join(" / ".join(f"{t:.1f}" for t in level) for level in times)
        total = sum(level[1] for level in times)
        print(f"  {users} x {beams} beams, {name}: levels {each} us (p20 / p50 / p80); all {total:.1f} us", flush=True)


if __name__ == "__main__":
    main()
