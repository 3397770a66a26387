"""A data set of one's own, from CSV files to a trained tokenizer and retriever, with the configs for it as they are.

    python -m benchmarks.own_data out/own

Writes 1,000,000 interactions of 50,000 users with 20,000 items, of which 19,000 occur; a user stays with one of 200
topics, which the titles name. Then runs both scripts for a few steps, on a temporal split with some 4,000 tasks
to evaluate: this shows that it works and what preparing the data takes, not how well it recommends.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

REPOSITORY = Path(__file__).parents[1]
USERS, ITEMS, SEEN, INTERACTIONS, TOPICS = 50_000, 20_000, 19_000, 1_000_000, 200


def generate(folder: Path) -> None:
    """Writes interactions.csv, with ISO dates and string ids in no order, and items.csv."""
    draw = np.random.default_rng(0)
    folder.mkdir(parents=True)
    user = np.sort(draw.integers(0, USERS, INTERACTIONS))
    jumps = draw.random(INTERACTIONS) < 0.2
    topic = np.where(jumps, draw.integers(0, TOPICS, INTERACTIONS), user % TOPICS)
    item = topic + TOPICS * (SEEN // TOPICS * draw.random(INTERACTIONS) ** 2).astype(int)
    second = 1_600_000_000 + draw.integers(0, 50_000_000, INTERACTIONS)
    events = pl.DataFrame({"user": user, "item": item, "timestamp": second}).select(
        user=pl.format("u{}", "user"),
        item=pl.format("B00{}X", "item"),
        timestamp=pl.from_epoch("timestamp").dt.to_string("iso:strict"),
    )
    events.sample(fraction=1, shuffle=True, seed=0).write_csv(folder / "interactions.csv")
    items = [
        (f"B00{n}X", f"Model {n // TOPICS} of series {n % TOPICS}", f"Made for topic{n % TOPICS}.")
        for n in range(ITEMS)
    ]
    pl.DataFrame(items, ["item", "title", "description"], orient="row").write_csv(folder / "items.csv")


def run(script: str, config: str, folder: Path, *bindings: str) -> None:
    bindings += (f'train.dataset_folder = "{folder}"', f'train.save_dir_root = "{folder}/out/{script}"')
    command = [sys.executable, f"{script}.py", f"configs/{config}"]
    for binding in bindings:
        command += ["--gin", binding]
    start = time.perf_counter()
    subprocess.run(command, cwd=REPOSITORY, check=True)
    print(f"\n{script}.py: {time.perf_counter() - start:.0f} s in all\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="scratch folder; must not exist")
    parser.add_argument("--steps", type=int, nargs=2, default=(300, 50), help="of the tokenizer and the retriever")
    parser.add_argument("--beams", type=int, default=10)
    arguments = parser.parse_args()
    folder, (first, second) = arguments.folder.resolve(), arguments.steps
    generate(folder)
    tables = (f'CustomData.interactions = "{folder}/interactions.csv"', f'CustomData.items = "{folder}/items.csv"')
    split = ('train.split = "temporal"', "temporal.valid_share = 0.002", "temporal.test_share = 0.002")
    run("train_rqvae", "rqvae_custom.gin", folder, *tables, *split, f"train.iterations = {first}")
    tokenizer = f'train.pretrained_rqvae_path = "{folder}/out/train_rqvae"'
    steps = (f"train.iterations = {second}", f"train.full_eval_every = {second}", f"train.beams = {arguments.beams}")
    run("train_decoder", "decoder_custom.gin", folder, tokenizer, *split, *steps, "train.batch_size = 64")


if __name__ == "__main__":
    main()
