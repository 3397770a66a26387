"""The trie over many items: time to build, bytes an item, and the cost of one masking step beside a small catalogue's.

python -m benchmarks.trie
"""

import argparse
import time

import torch

from modules.generation.trie import Trie


def random_codes(n: int, device: torch.device) -> torch.Tensor:
    """n distinct tuples of four codes of 256, in no order."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 2**32, (n + n // 8 + 1000,), generator=generator).unique()
    numbers = numbers[torch.randperm(len(numbers), generator=generator)[:n]].to(device)
    return torch.stack([numbers >> shift & 255 for shift in (24, 16, 8, 0)], 1).to(torch.int32)


def size(trie: Trie) -> float:
    """Bytes an item."""
    tensors = [*trie.first_child, *trie.code, trie.leaf_items, trie.item_codes, trie.item_nodes]
    return sum(tensor.nbytes for tensor in tensors) / trie.n_items


def seconds(function, device: torch.device, repeats: int) -> float:
    """Median of `repeats` calls."""
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2]


def masking_step(trie: Trie, users: int, beams: int, device: torch.device) -> float:
    """Seconds for the distribution over the children of each beam's node, on all levels."""
    logits = torch.randn(users, beams, 256, device=device)
    items = torch.randint(0, trie.n_items, (users, beams), device=device)
    nodes = trie.item_nodes[items]

    def step() -> None:
        for level in range(trie.n_levels):
            trie.log_probs(logits, level, nodes[..., level])

    step()
    return seconds(step, device, 15)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--items", type=int, nargs="+", default=[10_000, 1_000_000, 10_000_000])
    parser.add_argument("--users", type=int, default=512)
    parser.add_argument("--beams", type=int, default=10)
    args = parser.parse_args()
    device = torch.device(args.device)
    for n in args.items:
        codes = random_codes(n, device)
        build = seconds(lambda codes=codes: Trie.build(codes), device, 3)
        trie = Trie.build(codes)
        step = masking_step(trie, args.users, args.beams, device)
        print(
            f"{device}: {n:,} items: built in {build:.2f} s, {size(trie):.1f} bytes an item, fanout {trie.fanout}, "
            f"masking {args.users} x {args.beams} beams on all levels {1e3 * step:.2f} ms",
            flush=True,
        )


if __name__ == "__main__":
    main()
