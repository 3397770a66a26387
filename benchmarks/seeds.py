"""Trains tokenizer and retriever with several seeds, and prints what the seeds and the users make of the figures.

    python -m benchmarks.seeds out/seeds configs/rqvae_amazon.gin configs/decoder_amazon.gin --seeds 3 \
        --compare fused/new sasrec/new

Seed n trains in <folder>/<n>; what is done there already is gone on with. Prints tables in Markdown: mean and standard
deviation over the seeds of each row under each protocol, and for each pair to compare the difference, its 95 %
interval from drawing users with replacement, and the share of draws without a gain. A user's gain is the mean over the
seeds.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from training.metrics import paired_bootstrap

REPOSITORY = Path(__file__).parents[1]
NAMES = ("recall@10", "ndcg@10")


def run(script: str, config: str, bindings: list[str]) -> None:
    command = [sys.executable, script, config]
    for binding in bindings:
        command += ["--gin", binding]
    subprocess.run(command, cwd=REPOSITORY, check=True)


def train(folder: Path, seed: int, arguments: argparse.Namespace) -> Path:
    """Both stages with one seed; returns the retriever's run folder."""
    tokenizer, retriever = folder / "rqvae", folder / "decoder"
    own = [f"train.seed = {seed}", f'train.save_dir_root = "{tokenizer}"']
    run("train_rqvae.py", arguments.tokenizer, [*arguments.tokenizer_gin, *own])
    own = [f"train.seed = {seed}", f'train.save_dir_root = "{retriever}"']
    own += [f'train.pretrained_rqvae_path = "{tokenizer}"']
    run("train_decoder.py", arguments.retriever, [*arguments.retriever_gin, *own])
    return retriever


def table(metrics: list[dict[str, float]], rows: list[str]) -> None:
    """One line per row and protocol, from each seed's metrics.json."""
    print(f"\n| {len(metrics)} seeds | {' | '.join(NAMES)} |\n|---|---|---|")
    for row in rows:
        values = [[figures[f"test/{row}/{name}"] for figures in metrics] for name in NAMES]
        spread = [f" ± {statistics.stdev(own):.4f}" if len(own) > 1 else "" for own in values]
        cells = (f"{statistics.mean(own):.4f}{around}" for own, around in zip(values, spread, strict=True))
        print(f"| {row} | {' | '.join(cells)} |")


def comparison(ranks: list[dict[str, torch.Tensor]], a: str, b: str) -> None:
    """One line a metric, from each seed's ranks."""
    of_a, of_b = (torch.stack([own[row].long() for own in ranks]) for row in (a, b))  # [seeds, S]
    print(f"\n| {a} against {b} | difference | 95 % interval | not better |\n|---|---|---|---|")
    for name, found in paired_bootstrap(of_a, of_b, k=10).items():
        interval = f"{found['low']:+.4f} to {found['high']:+.4f}"
        print(f"| {name} | {found['difference']:+.4f} | {interval} | {found['not_better']:.2%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the runs go")
    parser.add_argument("tokenizer", help="gin file of train_rqvae.py")
    parser.add_argument("retriever", help="gin file of train_decoder.py")
    parser.add_argument("--seeds", type=int, default=3)
    for name in ("--tokenizer-gin", "--retriever-gin"):
        parser.add_argument(
            name, action="append", default=[], metavar="BINDING", help="override a parameter; repeatable"
        )
    pair = "ROW/PROTOCOL", "ROW/PROTOCOL"
    parser.add_argument(
        "--compare", action="append", default=[], nargs=2, metavar=pair, help="first against second; repeatable"
    )
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    roots = [train(folder / str(seed), seed, arguments) for seed in range(arguments.seeds)]
    ranks = [load_file(root / "ranks.safetensors") for root in roots]
    table([json.loads((root / "metrics.json").read_text()) for root in roots], list(ranks[0]))
    for a, b in arguments.compare:
        comparison(ranks, a, b)


if __name__ == "__main__":
    main()
