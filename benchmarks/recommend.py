"""Recommending from a pipeline of Amazon Beauty's size: start-up, files, one history at a time, memory, filters.

    python -m benchmarks.recommend

The weights are random, which changes no shape; histories are as long as Beauty's. Files: histories from parquet, the 10
best items of each into parquet, as recommend.py does it; once more with random items in place of the model's, which
leaves what reading, looking up keys and writing take.
"""

import argparse
import gc
import random
import resource
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch

import recommend
from benchmarks.timing import heading
from benchmarks.training import MAX_ITEMS, N_ITEMS, N_USERS, beauty_like, catalogue, make_model
from common.schemas import RankedItems
from data.histories import read_histories
from data.results import write_table
from modules.serving.pipeline import Pipeline
from modules.serving.recommender import Recommender
from modules.tokenizer.semids import SemanticIds, features_digest
from training import distributed

K, REPEATS = 10, 3


def key(item: int) -> str:
    return f"B{item:09d}"


def save_pipeline(folder: Path) -> None:
    features = catalogue(torch.device("cpu"))[1].numpy()
    model = make_model(256, torch.device("cpu"))
    codes = torch.stack([code[nodes] for code, nodes in zip(model.tree.code, model.tree.item_nodes.T[1:], strict=True)])
    made = {"item_features": features_digest(features)}
    ids = SemanticIds(codes.T.long(), (256, 256, 256), [key(n) for n in range(N_ITEMS)], "random", "0" * 16, made)
    titles = [f"The title of item {n}, as long as they are" for n in range(N_ITEMS)]
    Pipeline(model, ids, features, titles, torch.arange(N_ITEMS) % 99, MAX_ITEMS).save(folder)


def start_up(folder: Path, device: str) -> Recommender:
    start = time.perf_counter()
    recommender = Recommender.from_pretrained(folder, device=device)
    loaded = time.perf_counter()
    recommender.recommend([[key(1)]])
    print(
        f"start-up: loaded in {loaded - start:.2f} s, first answer {time.perf_counter() - loaded:.2f} s later",
        flush=True,
    )
    return recommender


def files(recommender: Recommender, folder: Path, users: int, accelerator) -> None:
    import polars as pl

    data = beauty_like(users)
    rows = [[key(n) for n in row.tolist()[:-1]] for row in data.items.split(data.offsets.diff().tolist())]
    histories, out = folder / "histories.parquet", folder / "recommendations.parquet"
    pl.DataFrame({"user": [f"A{n:012d}" for n in range(users)], "items": rows}).write_parquet(histories)

    def random_items(rows, k, left_out, cold_bonus) -> RankedItems:
        shape = rows.batch_size, k
        return RankedItems(torch.randint(N_ITEMS, shape), torch.rand(shape))

    def once() -> float:
        start = time.perf_counter()
        chunks = read_histories(histories, size=recommend.CHUNKS[accelerator.device.type])
        counts = recommend.Counts(histories, set())
        write_table(out, recommend.tables(recommender, chunks, {"k": K}, accelerator, counts))
        return time.perf_counter() - start

    seconds = sorted(once() for _ in range(REPEATS))[REPEATS // 2]
    with patch.object(recommender, "_by_model", random_items):
        around = sorted(once() for _ in range(REPEATS))[REPEATS // 2]
    print(f"files: {users:,} users in {seconds:.3f} s, {users / seconds:,.0f} users/s; {around:.3f} s around the model")


def one_by_one(recommender: Recommender, draw: random.Random, requests: int) -> None:
    histories = [[key(draw.randrange(N_ITEMS)) for _ in range(draw.randint(1, 20))] for _ in range(requests)]
    times = []
    for history in histories:
        start = time.perf_counter()
        recommender.recommend([history], K)
        times.append(1e3 * (time.perf_counter() - start))
    p50, p99 = torch.tensor(times).quantile(torch.tensor([0.5, 0.99])).tolist()
    print(f"one history at a time, {requests:,} of 1 to 20 items: {p50:.2f} / {p99:.2f} ms (p50 / p99)", flush=True)


def growth(recommender: Recommender, draw: random.Random, requests: int) -> None:
    """After a tenth of the requests and after all."""
    for n in range(requests):
        batch = [[key(draw.randrange(N_ITEMS)) for _ in range(draw.randint(0, 50))] for _ in range(draw.randint(1, 64))]
        recommender.recommend(batch, K)
        if n + 1 in (requests // 10, requests):
            gc.collect()
            tensors = sum(type(value) is torch.Tensor for value in gc.get_objects())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20
            on_card = f", {torch.cuda.memory_reserved() / 2**20:,.0f} MiB on the card" * torch.cuda.is_available()
            print(
                f"after {n + 1:,} requests, 1 to 64 histories of 0 to 50 items: {tensors:,} tensors, {resident:,.0f} "
                f"MiB resident, at most {peak:,.0f}{on_card}",
                flush=True,
            )


def filters(recommender: Recommender, draw: random.Random, users: int) -> None:
    """Against the ranking of all items, without the others."""
    histories = [[key(draw.randrange(N_ITEMS)) for _ in range(draw.randint(0, 20))] for _ in range(users)]
    every = recommender.recommend(histories, N_ITEMS)
    half, five = (set(draw.sample(recommender.keys, n)) for n in (N_ITEMS // 2, 5))
    for name, given in (("block", half), ("allow", five)):
        equal = 0
        for row, found in zip(every, recommender.recommend(histories, K, **{name: given}), strict=True):
            left = [item.key for item in row.items if (item.key in given) == (name == "allow")][:K]
            equal += left == [item.key for item in found.items]
        print(
            f"{name} {len(given):,} items: {equal} of {users} lists equal the exact ranking of what is left", flush=True
        )


def main() -> None:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if gpu else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--users", type=int, default=N_USERS)
    parser.add_argument("--requests", type=int, default=10_000, help="whose memory is watched")
    args = parser.parse_args()
    if args.device == "cuda":
        heading()
    accelerator, draw = distributed.start(cpu=args.device == "cpu"), random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        save_pipeline(folder := Path(name) / "pipeline")
        recommender = start_up(folder, args.device)
        files(recommender, folder.parent, args.users, accelerator)
    one_by_one(recommender, draw, 1000)
    filters(recommender, draw, 64)
    growth(recommender, draw, args.requests)


if __name__ == "__main__":
    main()
