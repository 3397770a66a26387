"""Generation: users a second by beam search and by the exact ranking, and the time that one user waits.

    python -m benchmarks.generation
    python -m benchmarks.generation --items 10_000_000 --dims 256

Histories are as long as Amazon Beauty's test histories, over a catalogue of as many items (or --items); the weights are
random, which changes no shape. What is timed ends with a user's 10 best items by both heads together. On a GPU passes
are recorded as CUDA graphs, as evaluation uses them, in batches that are filled up. The limit of many users is the
arithmetic of the matrix products with encoder, level queries, nodes of the first level and, where all are ranked, all
nodes and items, at the card's bfloat16 rate; that of one user the time to read what is multiplied once at its copy
bandwidth.
"""

import argparse
import time
from collections.abc import Callable

import torch

from benchmarks.timing import copy_bandwidth, heading, mark, matrix_rate, seconds_between
from benchmarks.training import MAX_ITEMS, N_ITEMS, N_USERS, beauty_like, last_of_each, make_model, weights
from data.batches import SequenceSource
from modules.generation.beam_search import beam_search, whole_catalogue
from modules.model import EncoderDecoderRetrievalModel
from modules.serving.recommender import MAX_EXACT
from modules.tree import Tree
from ops.jagged import JaggedTensor
from training.replay import Replay

TOP, REPEATS = 10, 3


@torch.no_grad()
def searcher(model: EncoderDecoderRetrievalModel, beams: int | None, args) -> Callable[[JaggedTensor], torch.Tensor]:
    """Histories -> best items [B, TOP]; beams: None ranks the whole catalogue."""
    device, half = torch.device(args.device), args.dtype == "bfloat16"
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        vectors = model.vectors()

    @torch.no_grad()
    def best(history: JaggedTensor) -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            inputs = model, model.encode(history, vectors), vectors
            found = beam_search(*inputs, beams, history) if beams else whole_catalogue(*inputs, history)
        return found.best(model.item_share, TOP).items

    return best


def multiplied(model: EncoderDecoderRetrievalModel, beams: int | None) -> tuple[int, int]:
    """Weights that are multiplied with each token of a history, and with each user."""
    dim, counts = model.config["dim"], model.tree.n_nodes
    rows = counts[0] if beams else sum(counts) + model.tree.n_items
    return weights(model.encoder), weights(model.queries) + rows * dim


def throughput(
    model: EncoderDecoderRetrievalModel, beams: int | None, batch_size: int, args, rate: float | None
) -> None:
    device, best, data = torch.device(args.device), searcher(model, beams, args), beauty_like(args.users, args.items)
    source, gpu = SequenceSource(data, last_of_each(data), MAX_ITEMS, device), device.type == "cuda"
    search = Replay(lambda sizes, *plan: best(source.data.planned(sizes, *plan).history), [], device, gpu)

    def batch_times() -> list[float]:
        """Seconds of each batch of one round, drawn and generated one after another."""
        marks = [mark(device)]
        for plan in source.plans(batch_size, filled=gpu):
            search(*plan)
            marks.append(mark(device))
        return seconds_between(marks)

    batch_times()
    rates = sorted(args.users / sum(batch_times()) for _ in range(REPEATS))
    by_token, by_user = multiplied(model, beams)
    tokens = source.n_items(torch.arange(args.users)) / args.users
    share = 2 * (tokens * by_token + by_user) * rates[1] / rate if rate else None
    print(
        f"{name(beams)}, {args.users:,} users in batches of {batch_size}: {rates[1]:,.1f} users/s ({rates[0]:,.1f} to "
        f"{rates[2]:,.1f})" + (f", {share:.1%} of the limit" if share else ""),
        flush=True,
    )


def latency(model: EncoderDecoderRetrievalModel, beams: int | None, args, bandwidth: float | None) -> None:
    """Of one user after another, from a history on the host to items on the host."""
    device, best = torch.device(args.device), searcher(model, beams, args)
    data = beauty_like(args.one_by_one, args.items)
    source, gpu = SequenceSource(data, last_of_each(data), MAX_ITEMS, torch.device("cpu")), device.type == "cuda"
    search = Replay(lambda longest, items, offsets: best(JaggedTensor(items, offsets, longest)), [], device, gpu)
    batches = [batch.history for batch in source.in_order(1, filled=gpu)]
    for history in batches[:20]:
        search(history.max_length, history.values, history.offsets)
    times = []
    for history in batches:
        start = time.perf_counter()
        search(history.max_length, history.values, history.offsets).cpu()
        times.append(1e3 * (time.perf_counter() - start))
    p50, p99 = torch.tensor(times).quantile(torch.tensor([0.5, 0.99])).tolist()
    size = 2 if args.dtype == "bfloat16" else 4
    limit = 1e3 * size * sum(multiplied(model, beams)) / bandwidth if bandwidth else None
    print(
        f"{name(beams)}, one user: {p50:.3f} / {p99:.3f} ms (p50 / p99)"
        + (f", {limit / p50:.1%} of the limit" if limit else ""),
        flush=True,
    )


def tree_tensors(tree: Tree) -> list[torch.Tensor]:
    return [*tree.first_child, *tree.parent, *tree.code, *tree.first_leaf, tree.leaf_items, tree.item_nodes]


def name(beams: int | None) -> str:
    return f"{beams} beams" if beams else "all items"


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--dtype", default="bfloat16" if gpu else "float32", choices=["bfloat16", "float32"])
    parser.add_argument("--batch", type=int, nargs="+", default=[512, 2048] if gpu else [128])
    parser.add_argument("--beams", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--dims", type=int, nargs="+", default=[256, 64])
    parser.add_argument("--users", type=int, default=N_USERS if gpu else 512)
    parser.add_argument("--items", type=int, default=N_ITEMS)
    parser.add_argument("--one-by-one", type=int, default=1000 if gpu else 200, help="users whose latency is measured")
    args = parser.parse_args()
    rate = bandwidth = None
    if args.device == "cuda":
        heading()
        rate, bandwidth = matrix_rate(), copy_bandwidth()
        print(f"bfloat16 matrix product: {rate / 1e12:.0f} TFLOP/s; device copy: {bandwidth / 1e12:.2f} TB/s")
    for dim in args.dims:
        model = make_model(dim, torch.device(args.device), args.items).eval()
        size = sum(t.numel() * t.element_size() for t in tree_tensors(model.tree)) / args.items
        print(f"{dim} wide, {args.dtype}; the tree has {size:.0f} bytes an item")
        for beams in (*args.beams, None) if args.items <= MAX_EXACT else args.beams:
            for batch in args.batch:
                throughput(model, beams, batch, args, rate)
            latency(model, beams, args, bandwidth)


if __name__ == "__main__":
    main()
