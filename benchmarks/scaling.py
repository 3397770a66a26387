"""Training on 1 and more GPUs at the same batch a GPU and at the same global batch: speed, memory, metrics.

    python -m benchmarks.scaling --gpus 1 2 4
    python -m benchmarks.scaling --gpus 1 2 4 --config ml32m --folder dataset/ml32m --tokenizer out/rqvae_ml32m

All goes through train_decoder.py, evaluation included. Without --folder the data are made up, in Amazon's files: 20,000
users who walk through 12,000 items with jumps. --cpu takes gloo processes instead of GPUs.

Targets/s: of the whole run as it logs them, without evaluation and the main process's recordings of new batch sizes,
but with the waits for those of others. Users/s: of the last validation. Communication: what summing gradients and
gathering weights of the model's size takes by itself, as a share of a step. GiB: the main process's GPU.
"""

import argparse
import gzip
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open

from data.processed import RecDataset, load_corpus
from data.splits import leave_one_out, windows
from training import distributed
from training.flat import FlatParameters

REPOSITORY = Path(__file__).parents[1]
DATA = {"amazon": RecDataset.AMAZON, "ml32m": RecDataset.ML_32M}
MAX_ITEMS = {"amazon": 50, "ml32m": 200}  # of the configs
ROUNDS = 30
HEADING = """| processes | batch each | global batch | targets/s | times | communication | users/s | GiB | test |
|---|---|---|---|---|---|---|---|---|"""


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


def launch(processes: int, cpu: bool, *command: str) -> str:
    """What a command under torchrun prints."""
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command)
    environment = os.environ | ({"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} if cpu else {})
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return done.stdout


def train(stage: str, config: str, folder: Path, root: Path, processes: int, cpu: bool, *bindings: str) -> Path:
    """Runs one stage and returns its run folder."""
    bindings = (f'train.dataset_folder="{folder}"', f'train.save_dir_root="{root}"', *bindings)
    arguments = [argument for binding in bindings for argument in ("--gin", binding)]
    launch(processes, cpu, f"train_{stage}.py", f"configs/{stage}_{config}.gin", *arguments)
    return root


def targets_per_history(config: str, folder: Path) -> float:
    dataset = DATA[config]
    corpus = load_corpus(dataset, str(folder), "beauty" if dataset is RecDataset.AMAZON else "")
    lengths = leave_one_out(corpus.interactions).train_lengths
    return float((lengths - 1).clamp_min(0).sum()) / len(windows(lengths, MAX_ITEMS[config]))


def measured(root: Path) -> tuple[float, float, float]:
    """Histories/s, seconds of the last validation, GiB of the main process's GPU."""
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["split"] == "train"]
    last = [row for row in rows if row["split"] == "valid"][-1]
    seconds, memory = last["time"] - steps[-1]["time"], max(row.get("gpu_memory_gib", 0) for row in steps)
    return steps[-1]["examples_per_second"], seconds, memory


def communication(run: Path, processes: int, cpu: bool) -> float:
    """Seconds of `collectives` for a run's model."""
    if processes == 1:
        return 0.0
    with safe_open(run / "pipeline" / "model.safetensors", "pt") as file:
        size = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    return float(launch(processes, cpu, "-m", "benchmarks.scaling", "--collectives", str(size)).split()[-1])


def collectives(size: int) -> None:
    """Prints the seconds that the processes of this launch take to sum `size` gradients and gather as many weights."""
    accelerator = distributed.start()
    flat = FlatParameters([torch.nn.Parameter(torch.zeros(size, device=accelerator.device))])
    for repeat in range(ROUNDS + 5):
        if repeat == 5:
            float(flat.own[0])  # waits for the device
            start = time.perf_counter()
        flat.flat.grad = flat.flat.detach()
        flat.sum_grads()
        flat.gather()
    float(flat.flat[0])
    if accelerator.is_main_process:
        print((time.perf_counter() - start) / ROUNDS)
    distributed.end(accelerator)


def made_up(arguments: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """A dataset folder, and the run of stage 1 on it."""
    write_corpus(folder / "raw" / "beauty", arguments.users, arguments.items)
    settings = ["train.features=[@TfidfSvd()]", "TfidfSvd.dim=32", "train.iterations=200", "train.refit_every=100"]
    settings.append("train.collapse_is_error=False")  # items may be fewer than there are codes
    return folder, train("rqvae", "amazon", folder, folder / "rqvae", 1, arguments.cpu, *settings)


def compare(arguments: argparse.Namespace, folder: Path, tokenizer: Path, runs: Path) -> None:
    """Prints a row for each number of processes and size of batches."""
    steps, config, cpu, first = arguments.steps, arguments.config, arguments.cpu, 0.0
    settings = [f'train.pretrained_rqvae_path="{tokenizer.resolve()}"', f"train.iterations={steps}"]
    settings += [f"train.log_every={steps // 40}", f"train.full_eval_every={steps // 2}"]
    settings += ["train.partial_eval_every=0", "train.save_model_every=0", *arguments.gin]
    targets = targets_per_history(config, folder)
    print(f"{config}: {targets:.1f} targets per history\n\n{HEADING}", flush=True)
    for n in arguments.gpus:
        seconds = None
        for batch in sorted({arguments.batch, arguments.batch * n}):
            bindings = *settings, f"train.batch_size={batch}"
            run = train("decoder", config, folder, runs / f"{n}_{batch}", n, cpu, *bindings)
            histories, validation, memory = measured(run)
            first = first or histories
            metrics = json.loads((run / "metrics.json").read_text())
            seconds = communication(run, n, cpu) if seconds is None else seconds
            share = seconds * histories / batch
            row = [f"{n} | {batch // n} | {batch} | {targets * histories:,.0f} | {histories / first:.2f} | {share:.1%}"]
            row += [f"{metrics['test/users'] / validation:,.0f} | {memory:.1f}"]
            row += [f"{metrics['test/recall@10']:.4f}, {metrics['test/ndcg@10']:.4f}"]
            print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=256, help="histories per GPU")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--config", choices=list(DATA), default="amazon")
    parser.add_argument("--folder", type=Path, help="a dataset folder of the config; needs --tokenizer")
    parser.add_argument("--tokenizer", type=Path, help="the run of stage 1")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--gin", action="append", default=[], metavar="BINDING", help="of the retriever; repeatable")
    parser.add_argument("--collectives", type=int, metavar="SIZE", help=argparse.SUPPRESS)  # in each process
    arguments = parser.parse_args()
    if arguments.collectives is not None:
        return collectives(arguments.collectives)
    if arguments.steps < 40 or (arguments.folder is None) != (arguments.tokenizer is None):
        parser.error("--steps: at least 40; --folder and --tokenizer go together")
    with TemporaryDirectory() as name:
        folder, tokenizer = arguments.folder, arguments.tokenizer
        if folder is None:
            folder, tokenizer = made_up(arguments, Path(name))
        compare(arguments, folder, tokenizer, Path(name))


if __name__ == "__main__":
    main()
