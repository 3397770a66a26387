"""Training speed of the retriever on histories as long as Amazon Beauty's, drawing and optimizer included.

    python -m benchmarks.training

"all": one pass over a history serves each of its items as a target, on a GPU recorded as a CUDA graph, as in
train_decoder.py; "eager": the same, launched by the host; "one": each history has one target; "padded": "all" with all
histories as long as the longest, which is what a padded model computes; only the targets of the real lengths count. The
limit is the arithmetic of the matrix products of real items at the card's measured bfloat16 rate.
"""

import argparse
import time

import torch

from benchmarks.attention import BEAUTY
from benchmarks.timing import heading, mark, matrix_rate, seconds_between
from common.schemas import Interactions, Samples
from data.batches import SequenceSource, bucket_size, padding_rows
from data.shuffle import Shuffler
from data.splits import windows
from modules.model import EncoderDecoderRetrievalModel
from modules.tree import Tree
from training.flat import FlatParameters
from training.replay import Replay

MAX_ITEMS, N_ITEMS, N_USERS, N_FEATURES = 20, 12_101, 22_363, 384
WARMUP = 5  # steps, in which libraries choose their kernels


def beauty_like(users: int = N_USERS, n_items: int = N_ITEMS) -> Interactions:
    """Random items in histories whose lengths follow Beauty's; one more item each, the last one's target."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.tensor(BEAUTY, dtype=torch.float)
    lengths = torch.multinomial(weights, users, replacement=True, generator=generator) + 2
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Interactions(torch.randint(0, n_items, (int(offsets[-1]),), generator=generator, dtype=torch.int32), offsets)


def full_length(users: int = N_USERS) -> Interactions:
    """Histories of the greatest length, and a target each."""
    generator = torch.Generator().manual_seed(0)
    items = torch.randint(0, N_ITEMS, (users * (MAX_ITEMS + 1),), generator=generator, dtype=torch.int32)
    return Interactions(items, torch.arange(users + 1) * (MAX_ITEMS + 1))


def last_of_each(data: Interactions) -> Samples:
    """Every user's last item as the target."""
    last = data.offsets.diff() - 1
    return Samples(torch.arange(len(last)), last, torch.zeros_like(last))


def catalogue(device: torch.device, n_items: int = N_ITEMS) -> tuple[Tree, torch.Tensor]:
    """A tree of unique codes on three levels of 256, the first two unevenly used, and features [N, D] float16. With a
    million items or more: four levels and 64 columns."""
    levels, columns = (3, N_FEATURES) if n_items < 1_000_000 else (4, 64)
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(2 * n_items, levels, generator=generator, dtype=torch.float64)
    uniform[:, :2] **= 2
    codes = (256 * uniform).long().unique(dim=0)
    codes = codes[torch.randperm(len(codes), generator=generator)[:n_items]]
    features = torch.randn(n_items, columns, generator=generator).half()
    return Tree.build(codes, (256,) * levels).to(device), features.to(device)


def make_model(dim: int, device: torch.device, n_items: int = N_ITEMS) -> EncoderDecoderRetrievalModel:
    """The model that train_decoder.py trains by default, in another width."""
    torch.manual_seed(0)
    tree, features = catalogue(device, n_items)
    return EncoderDecoderRetrievalModel(tree, features, dim=dim, ff_dim=4 * dim, n_heads=2, head_dim=dim // 2)


def weights(*modules: torch.nn.Module) -> int:
    """Numbers in the modules' matrices."""
    return sum(p.numel() for module in modules for p in module.parameters() if p.ndim == 2)


def operations(model: EncoderDecoderRetrievalModel, tokens: float, targets: float) -> float:
    """Of a step's matrix products, forward and backward; attention's and those below the first level left out."""
    sums = [vectors for vectors in (model.items, *model.nodes) if vectors is not None]
    described = sum(len(of.features) * weights(of.mlp) for of in sums if of.features is not None and of.mlp is not None)
    scored = model.config["dim"] * (model.tree.n_items + model.tree.n_nodes[0])
    return 6 * (described + tokens * weights(model.encoder) + targets * (weights(model.queries) + scored))


def measure(dim: int, batch_size: int, kind: str, args, peak: float | None) -> None:
    device = torch.device(args.device)
    real = beauty_like()  # each user has one window, in "padded" as well
    data = full_length() if kind == "padded" else real
    samples = last_of_each(data) if kind == "one" else windows(data.offsets.diff(), MAX_ITEMS)
    source = SequenceSource(data, samples, MAX_ITEMS, device, kind != "one")
    histories = real.offsets.diff() - 1
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    model = make_model(dim, device)
    flat = FlatParameters(model.parameters())
    optimizer = torch.optim.AdamW([flat.flat], 1e-3, fused=True)
    recorded = device.type == "cuda" and kind != "eager"
    padding = padding_rows(batch_size) if recorded else 0

    def passes(size: int, index: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = model(source.batch(index, uniform, size, padding)).loss
        loss.backward()
        flat.collect_grads()
        return loss.detach()

    replay = Replay(passes, [flat.flat], device, recorded)
    shuffler = Shuffler(len(source), batch_size, 0, samples.user)

    def step(number: int) -> tuple[int, int, torch.Tensor]:
        """Items and targets that count, and the loss."""
        index, uniform = shuffler.draw(number)
        loss = replay(bucket_size(source.n_items(index, uniform), padding, MAX_ITEMS), index, uniform)
        torch.nn.utils.clip_grad_norm_(flat.flat, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        items = int(histories[samples.user[index]].sum())
        return items, len(index) if kind == "one" else items, loss

    start = time.perf_counter()
    for number in range(WARMUP + (args.steps if recorded else 0)):  # the timed steps find every size recorded
        float(step(number)[2])
    ready = time.perf_counter() - start
    marks, counts = [mark(device)], []
    for number in range(args.steps):
        counts.append(step(WARMUP + number))
        marks.append(mark(device))
    times = seconds_between(marks)
    items, targets = (sum(column) for column in list(zip(*counts, strict=True))[:2])
    rate = operations(model, items / args.steps, targets / args.steps) * args.steps / sum(times)
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).mul(1e3).tolist()
    memory = f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device.type == "cuda" else ""
    print(
        f"{dim} wide, {batch_size} histories, {kind}, {args.dtype}: {targets / sum(times):,.0f} targets/s; a step "
        f"{p20:.2f} / {p50:.2f} / {p80:.2f} ms (p20 / p50 / p80); {rate / 1e12:.2f} TFLOP/s"
        + (f" ({rate / peak:.0%} of the limit)" if peak else "")
        + f"{memory}; before that {ready:.0f} s; loss {float(counts[-1][2]):.3f}",
        flush=True,
    )


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 4096] if gpu else [256])
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 64])
    kinds = ["all", "eager", "one", "padded"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds if gpu else ["eager", "one", "padded"])
    parser.add_argument("--steps", type=int, default=60 if gpu else 5)
    args = parser.parse_args()
    peak = None
    if args.device == "cuda":
        heading()
        peak = matrix_rate()
        print(f"bfloat16 matrix product: {peak / 1e12:.0f} TFLOP/s")
    for dim in args.dims:
        for batch in args.batch:
            for kind in args.kinds:
                measure(dim, batch, kind, args, peak)


if __name__ == "__main__":
    main()
