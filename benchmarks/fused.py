"""The operations around the matrix products against torch's own, each recorded as a CUDA graph.

    python -m benchmarks.fused

Needs a CUDA GPU. The catalogue is as large as Amazon Beauty's; items are drawn at random. The limit is the device's
copy bandwidth over the bytes that must be read and written, distinct rows of a table once; that of the cross-entropy
the arithmetic of its products, one forward and two backward, at the rate of a large one. Operations on the tree:
`benchmarks.tree`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import copy_bandwidth, heading, matrix_rate, quantiles, replayed, row
from benchmarks.training import N_ITEMS, catalogue
from ops.cross_entropy import linear_cross_entropy
from ops.sums import RowSums, sum_rows, take_rows


def compare(name: str, functions: dict[str, Callable], leaves: list[Tensor], grad: Tensor, limits: tuple) -> None:
    """Forward, and forward with the gradients of the leaves, of ours and torch's. limits: in microseconds."""
    print(f"\n{name}\n  {'microseconds':<52}{'p20':>10}{'p50':>10}{'p80':>10}{'of limit':>9}")
    for title, function in functions.items():
        forward = replayed(lambda function=function: function(*(leaf.detach() for leaf in leaves)))
        row(f"{title}, forward", quantiles(forward), limits[0])
        both = replayed(lambda function=function: torch.autograd.grad(function(*leaves), leaves, grad))
        row(f"{title}, forward + backward", quantiles(both), sum(limits))


def compare_losses(targets: int, width: int, dtype: torch.dtype, device: torch.device, rate: float) -> None:
    """Of the item head, over all items."""
    leaves = [torch.randn(n, width, device=device, dtype=dtype, requires_grad=True) for n in (targets, N_ITEMS)]
    items, weights = torch.randint(0, N_ITEMS, (targets,), device=device), torch.ones(targets, device=device)
    limit = 1e6 * 2 * targets * N_ITEMS * width / rate
    functions = {
        "without all logits": lambda x, vectors: linear_cross_entropy(x, vectors, items, weights),
        "torch": lambda x, vectors: F.cross_entropy((x @ vectors.T).float(), items, reduction="sum"),
    }
    title = f"cross-entropy of {targets:,} targets over {N_ITEMS:,} items, {width} wide, {str(dtype)[6:]}"
    compare(title, functions, leaves, torch.ones((), device=device), (limit, 2 * limit))


def compare_sums(width: int, device: torch.device, bandwidth: float) -> None:
    """The vectors of all items, each the sum of one of its own and those of its codes."""
    tree, _ = catalogue(device)
    starts = N_ITEMS + torch.tensor(tree.level_sizes, device=device).cumsum(0) - tree.level_sizes[0]
    codes = [code[tree.item_nodes[:, level + 1]] for level, code in enumerate(tree.code)]
    rows = torch.cat([torch.arange(N_ITEMS, device=device)[:, None], torch.stack(codes, 1) + starts], 1)
    sums, table = RowSums.of(rows), torch.randn(N_ITEMS + sum(tree.level_sizes), width, device=device)
    functions = {
        "ours": lambda table: sum_rows(table, sums),
        "torch": lambda table: F.embedding(sums.rows, table).sum(1),
    }
    grad = torch.randn(N_ITEMS, width, device=device)
    limit = 1e6 * (table.nbytes + grad.nbytes) / bandwidth
    compare(f"vectors of all items, {width} wide, float32", functions, [table.requires_grad_()], grad, (limit, limit))


def compare_takes(count: int, width: int, device: torch.device, bandwidth: float) -> None:
    """The vectors of the items of histories."""
    table = torch.randn(N_ITEMS, width, device=device, dtype=torch.bfloat16, requires_grad=True)
    items = torch.randint(0, N_ITEMS, (count,), device=device)
    grad = torch.randn(count, width, device=device, dtype=torch.bfloat16)
    read = len(items.unique()) * width * table.element_size()
    limits = 1e6 * (read + grad.nbytes) / bandwidth, 1e6 * (grad.nbytes + table.nbytes) / bandwidth
    functions = {"ours": lambda table: take_rows(table, items), "torch": lambda table: F.embedding(items, table)}
    compare(f"{count:,} of {N_ITEMS:,} rows, {width} wide, bfloat16", functions, [table], grad, limits)


def main() -> None:
    heading()
    torch.manual_seed(0)
    device, bandwidth = torch.device("cuda"), copy_bandwidth()
    rates = {dtype: matrix_rate(dtype) for dtype in (torch.bfloat16, torch.float32)}
    print(f"device copy: {bandwidth / 1e12:.2f} TB/s; matrix products:", end=" ")
    print(", ".join(f"{rate / 1e12:.0f} TFLOP/s in {str(dtype)[6:]}" for dtype, rate in rates.items()))
    for targets, dtype in ((2_000, torch.bfloat16), (40_000, torch.bfloat16), (2_000, torch.float32)):
        compare_losses(targets, 256, dtype, device, rates[dtype])
    for width in (256, 64):
        compare_sums(width, device, bandwidth)
        for count in (2_000, 40_000):
            compare_takes(count, width, device, bandwidth)


if __name__ == "__main__":
    main()
