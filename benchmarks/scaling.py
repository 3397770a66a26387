"""Training speed of the retriever on 1 and more GPUs at the same batch a GPU, and its metrics at the same global batch.

    python -m benchmarks.scaling --gpus 1 2

Data are made up: 20,000 users who walk through 12,000 items with jumps. --cpu takes gloo processes instead of GPUs.
"""

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

REPOSITORY = Path(__file__).parents[1]
UNTIMED = 1 / 4  # share of the steps, the first, in which most sizes of batches are recorded


def write_corpus(folder: Path, users: int, items: int) -> None:
    """The Amazon layout; a user's next item is the 7th after the last with probability .7."""
    folder.mkdir(parents=True)
    draw, lines = random.Random(0), []
    for user in range(users):
        history = [draw.randrange(items)]
        for _ in range(draw.randint(4, 20)):
            history.append((history[-1] + 7) % items if draw.random() < 0.7 else draw.randrange(items))
        lines.append(" ".join(str(number + 1) for number in [user, *history]))
    (folder / "sequential_data.txt").write_text("\n".join(lines) + "\n")
    maps = {}
    for kind, count in (("user", users), ("item", items)):
        maps[f"{kind}2id"] = {f"{kind}{n}": str(n + 1) for n in range(count)}
        maps[f"id2{kind}"] = {number: key for key, number in maps[f"{kind}2id"].items()}
    (folder / "datamaps.json").write_text(json.dumps(maps))
    with gzip.open(folder / "meta.json.gz", "wt", compresslevel=1) as file:
        for n in range(items):
            words = " ".join(f"w{n // 10**k % 10}{k}" for k in range(5))
            file.write(f"{{'asin': 'item{n}', 'title': '{words}', 'categories': [['c{n % 50}']]}}\n")


def train(stage: str, folder: Path, name: str, processes: int, cpu: bool, *bindings: str) -> Path:
    """Runs one stage under torchrun and returns its run folder."""
    common = [f'train.dataset_folder="{folder}"', 'train.dataset_split="beauty"']
    root = folder / name
    common += [f'train.save_dir_root="{root}"', *bindings]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [f"train_{stage}.py", f"configs/{stage}_amazon.gin"]
    command += [argument for binding in common for argument in ("--gin", binding)]
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} if cpu else {})
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return root


def examples_per_second(root: Path, batch_size: int) -> float:
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["split"] == "train"]
    timed = [row for row in rows if row["step"] >= UNTIMED * rows[-1]["step"]]
    first, last = timed[0], timed[-1]
    return (last["step"] - first["step"]) * batch_size / (last["time"] - first["time"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=256, help="histories a GPU")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--gin", action="append", default=[], metavar="BINDING", help="of the retriever; repeatable")
    arguments = parser.parse_args()
    if arguments.steps < 40:
        parser.error("--steps: at least 40")
    with TemporaryDirectory() as name:
        folder, cpu = Path(name), arguments.cpu
        write_corpus(folder / "raw" / "beauty", arguments.users, arguments.items)
        features = ("train.features=[@TfidfSvd()]", "TfidfSvd.dim=32", "train.iterations=200", "train.refit_every=100")
        few_items = "train.collapse_is_error=False"  # they may be fewer than there are codes
        train("rqvae", folder, "rqvae", 1, cpu, *features, few_items)
        common = (
            f'train.pretrained_rqvae_path="{folder}/rqvae"',
            f"train.iterations={arguments.steps}",
            f"train.log_every={arguments.steps // 40}",
            "train.partial_eval_every=0",
            "train.full_eval_every=0",
            "train.save_model_every=0",
            *arguments.gin,
        )
        print("| processes | batch each | global batch | examples/s | times the first | test recall@10, ndcg@10 |")
        print("|---|---|---|---|---|---|")
        first = None
        for n in arguments.gpus:
            for batch in sorted({arguments.batch, arguments.batch * n}):
                run = train("decoder", folder, f"{n}_{batch}", n, cpu, *common, f"train.batch_size={batch}")
                speed = examples_per_second(run, batch)
                first = first or speed
                metrics = json.loads((run / "metrics.json").read_text())
                figures = f"{metrics['test/recall@10']:.6f}, {metrics['test/ndcg@10']:.6f}"
                print(f"| {n} | {batch // n} | {batch} | {speed:,.0f} | {speed / first:.2f} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
