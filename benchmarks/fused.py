"""The fused operations around the matrix products against their pure-torch twins, each recorded as a CUDA graph.

    python -m benchmarks.fused

Needs a CUDA GPU. The catalogue has as many items as Amazon Beauty, in four levels; items are drawn at random. The limit
is the device's copy bandwidth over the bytes that must be read and written; distinct rows of a table count once.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import copy_bandwidth, heading, quantiles, replayed, row
from benchmarks.training import N_ITEMS, catalogue
from modules.generation.trie import Trie
from modules.rqvae import RqVae
from ops import embedding, reference
from ops.trie import trie_cross_entropy
from training.flat import FlatAdamW


def compare(name: str, functions: dict[str, Callable], leaves: list[Tensor], grad: Tensor, limits: tuple) -> None:
    """Forward, and forward with the gradients of the leaves, of the kernel and its twin. limits: in microseconds."""
    print(f"\n{name}\n  {'microseconds':<52}{'p20':>10}{'p50':>10}{'p80':>10}{'of limit':>9}")
    for title, function in functions.items():
        forward = replayed(lambda function=function: function(*(leaf.detach() for leaf in leaves)))
        row(f"{title}, forward", quantiles(forward), limits[0])
        both = replayed(lambda function=function: torch.autograd.grad(function(*leaves), leaves, grad))
        row(f"{title}, forward + backward", quantiles(both), sum(limits))


def compare_losses(targets: int, dtype: torch.dtype, bandwidth: float) -> None:
    codes, sizes = catalogue()
    trie = Trie.build(codes).to("cuda")
    nodes = trie.item_nodes[torch.randint(0, N_ITEMS, (targets,), device="cuda")]
    grad = torch.full((), 1 / targets, device="cuda").expand(targets)
    for level, size in enumerate(sizes):
        logits = torch.randn(targets, size, device="cuda", dtype=dtype, requires_grad=True)
        arrays = (trie.first_child[level], trie.code[level], nodes[:, level], nodes[:, level + 1], trie.fanout[level])
        children = trie.first_child[level].diff()[nodes[:, level]]
        read = int(children[children > 1].sum()) * logits.element_size() + 8 * targets
        limits = [1e6 * n / bandwidth for n in (read + 8 * targets, read + 8 * targets + logits.nbytes)]
        compare(
            f"trie cross-entropy, level {level}: logits [{targets}, {size}] {str(dtype)[6:]}, "
            f"{float(children.float().mean()):.1f} children in the mean, at most {trie.fanout[level]}",
            {
                "kernel": lambda x, arrays=arrays: trie_cross_entropy(x, *arrays),
                "torch": lambda x, arrays=arrays: reference.trie_cross_entropy(x, *arrays),
            },
            [logits],
            grad,
            limits,
        )


def compare_vectors(items: int, levels: int, width: int, buckets: int, bandwidth: float) -> None:
    all_codes, sizes = catalogue()
    codes = all_codes[torch.randint(0, N_ITEMS, (items,))][:, :levels].contiguous().cuda()
    starts = (torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)).cuda()
    rows = [sum(sizes)] + ([buckets] if buckets else [])
    tables = [torch.randn(n, width, device="cuda", requires_grad=True) for n in rows]
    pad = [None] * (2 - len(tables))
    grad = torch.randn(items, levels, width, device="cuda")
    hashed = reference.hash_prefixes(codes)[:, 1:] % max(buckets, 1)
    read = (sum(sizes) + (len(hashed.unique()) if buckets else 0)) * width * 4 + codes.nbytes
    limits = [1e6 * n / bandwidth for n in (read + grad.nbytes, grad.nbytes + sum(rows) * width * 4)]
    compare(
        f"vectors of {items} x {levels} codes, width {width} float32, {buckets} prefix buckets",
        {
            "kernel": lambda *tables: embedding.embed_codes(codes, starts, *tables, *pad),
            "torch": lambda *tables: reference.embed_codes(codes, starts, *tables, *pad),
        },
        tables,
        grad,
        limits,
    )


def compare_updates(bandwidth: float) -> None:
    """Clipping and AdamW of the tokenizer 768-512-256-128-32, 3 x 256."""
    model = RqVae(768, embed_dim=32).cuda()
    n = sum(p.numel() for p in model.parameters())
    rate = torch.full((), 1e-3, device="cuda")
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.AdamW(model.parameters(), rate, fused=True, capturable=True)

    def by_torch() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    print(f"\nclipping and AdamW of {n:,} parameters")
    print(f"  {'microseconds':<52}{'p20':>10}{'p50':>10}{'p80':>10}{'of limit':>9}")
    limit = 1e6 * 28 * n / bandwidth  # four numbers are read, three written
    row("torch", quantiles(replayed(by_torch)), limit)
    flat = FlatAdamW(optimizer, 1.0)
    row("kernel", quantiles(replayed(lambda: flat.step(rate))), limit)


def main() -> None:
    heading()
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    print(f"device copy: {bandwidth / 1e12:.2f} TB/s")
    compare_losses(4096 * 20, torch.bfloat16, bandwidth)
    compare_losses(4096, torch.float32, bandwidth)
    compare_updates(bandwidth)
    for buckets in (0, 65_536):
        for items, levels in ((30_000, 4), (4096 * 20, 3), (2_000, 4)):
            for width in (384, 128):
                compare_vectors(items, levels, width, buckets, bandwidth)


if __name__ == "__main__":
    main()
