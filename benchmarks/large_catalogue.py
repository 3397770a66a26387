"""A catalogue of millions of items through both stages: drawn, cached, tokenized, trained, evaluated.

    python -m benchmarks.large_catalogue out/large                                       # 10 million items
    python -m benchmarks.large_catalogue out/large --items 100_000 --users 20_000 --steps 100 100 --max-rows 20_000

Items come in groups of 1,000, popular by Zipf's law within a group, as groups are. A user stays with a group or moves
to one of its four successors, the same for all users; the vectors of 64 columns say which group an item is of. The best
list knows the groups: its recall@10 is printed. Then both scripts run on it, with their phases and peaks of memory, and
the first 10,000 users get ten items each.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from common.schemas import Interactions
from data.corpus import Corpus
from modules.serving.recommender import Recommender
from ops.jagged import lengths_to_offsets

REPOSITORY = Path(__file__).parents[1]
GROUP, COLUMNS, SUCCESSORS, STAYS, MEAN, LONGEST = 1000, 64, 4, 0.7, 100, 400
NAME, SERVED = "large", 10_000
DATA = """
train.dataset = %data.processed.RecDataset.CUSTOM
train.dataset_folder = "{folder}"
CustomData.name = "large"
"""
TOKENIZER = """
train.save_dir_root = "{folder}/rqvae"
train.features = [@Vectors()]
train.iterations = {steps}
train.batch_size = 4096
train.log_every = 100
Vectors.path = "{folder}/vectors.npy"
RqVae.codebook_size = 256
RqVae.n_layers = 4
RqVae.embed_dim = 32
RqVae.hidden_dims = (128, 64)
"""
RETRIEVER = """
train.pretrained_rqvae_path = "{folder}/rqvae"
train.save_dir_root = "{folder}/decoder"
train.exclude_history = True
train.max_items = 50
train.iterations = {steps}
train.batch_size = 512
train.weight_decay = 0.0
train.exact = False
train.beams = 50
train.eval_batch_size = 2048
train.amp = True
train.mixed_precision_type = "bf16"
train.partial_eval_every = 0
train.full_eval_every = {steps}
train.log_every = 100
EncoderDecoderRetrievalModel.max_rows = {max_rows}
EncoderDecoderRetrievalModel.dropout = 0.1
"""


def draw(n_items: int, n_users: int, seed: int = 0) -> tuple[Interactions, np.ndarray]:
    """Histories, and the share of each rank within a group, [GROUP]."""
    generator = np.random.default_rng(seed)
    groups = n_items // GROUP
    within = np.cumsum(1 / np.arange(1, GROUP + 1))
    of_groups = np.cumsum(np.arange(1, groups + 1) ** -0.7)
    successors = generator.integers(0, groups, (groups, SUCCESSORS))
    lengths = np.sort(np.minimum(5 + generator.exponential(MEAN - 5, n_users).astype(np.int64), LONGEST))[::-1]
    offsets = lengths_to_offsets(torch.from_numpy(lengths.copy()))
    items, starts = np.empty(int(offsets[-1]), np.int32), offsets[:-1].numpy()
    group = np.searchsorted(of_groups, generator.random(n_users) * of_groups[-1])
    for step in range(int(lengths[0])):
        active = np.searchsorted(-lengths, -step)  # users with more than `step` items: the first ones
        rank = np.searchsorted(within, generator.random(active) * within[-1])
        items[starts[:active] + step] = rank * groups + group[:active]
        moves = generator.random(active) >= STAYS
        group[:active][moves] = successors[group[:active][moves], generator.integers(0, SUCCESSORS, int(moves.sum()))]
    return Interactions(torch.from_numpy(items), offsets), np.diff(within, prepend=0) / within[-1]


def write(folder: Path, n_items: int, n_users: int) -> None:
    """The cached corpus, and vectors.npy [N, COLUMNS] float16, a group's vector and noise for each item."""
    interactions, shares = draw(n_items, n_users)
    groups, generator = n_items // GROUP, np.random.default_rng(1)
    centres = generator.standard_normal((groups, COLUMNS), np.float32)
    vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float16, (n_items, COLUMNS))
    for start in range(0, n_items, groups):
        vectors[start : start + groups] = centres + 0.5 * generator.standard_normal((groups, COLUMNS), np.float32)
    vectors.flush()
    keys = [str(item) for item in range(n_items)]
    users = [str(user) for user in range(n_users)]
    Corpus.build(NAME, interactions, keys, users, keys, [[]] * n_items).save(folder / "processed" / NAME)
    print(f"{len(interactions):,} interactions; the best list of ten has recall {STAYS * shares[:10].sum():.3f}")


def run(stage: str, folder: Path, config: str, **values) -> None:
    script = f"train_{stage}"
    path = folder / f"{script}.gin"
    path.write_text((DATA + config).format(folder=folder, **values))
    start = time.perf_counter()
    subprocess.run([sys.executable, f"{script}.py", str(path.resolve())], cwd=REPOSITORY, check=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    took = time.perf_counter() - start
    print(f"\n{script}.py: {took:.0f} s, up to {peak:.1f} GiB of host memory so far")
    last = json.loads((folder / stage / "metrics.jsonl").read_text().splitlines()[-1])  # of an evaluation
    if "gpu_memory_gib" in last:
        print(f"{last['gpu_memory_gib']:.1f} GiB of the device's for tensors, {last['gpu_held_gib']:.1f} held by torch")
    print(flush=True)


def serve(folder: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    recommender = Recommender.from_pretrained(folder / "decoder", device=device)
    loaded = time.perf_counter()
    rows = Corpus.load(folder / "processed" / NAME).interactions
    histories = rows.items[: rows.offsets[SERVED]].split(rows.offsets.diff()[:SERVED].tolist())
    keys = [[str(item) for item in history.tolist()] for history in histories]
    asked = time.perf_counter()
    recommender.rank(keys)
    print(f"recommending: loaded in {loaded - start:.0f} s, {len(keys) / (time.perf_counter() - asked):,.0f} users/s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{peak:.1f} GiB of host memory, {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the device's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="scratch folder; what is there already is not drawn again")
    parser.add_argument("--items", type=int, default=10_000_000, help=f"a multiple of {GROUP}")
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--steps", type=int, nargs=2, default=(1000, 1000), help="of the tokenizer and the retriever")
    parser.add_argument("--max-rows", type=int, default=1_000_000)
    args = parser.parse_args()
    if args.items % GROUP:
        parser.error(f"--items must be a multiple of {GROUP}")
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "processed" / NAME).exists():
        start = time.perf_counter()
        write(folder, args.items, args.users)
        print(f"drawn and cached in {time.perf_counter() - start:.0f} s", flush=True)
    run("rqvae", folder, TOKENIZER, steps=args.steps[0])
    run("decoder", folder, RETRIEVER, steps=args.steps[1], max_rows=args.max_rows)
    serve(folder)


if __name__ == "__main__":
    main()
