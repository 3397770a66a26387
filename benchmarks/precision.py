"""Validation loss of the sample retriever in float32, fp16 and bf16, over seeds, and whether a run repeats bit for bit.

    python -m benchmarks.precision

On one GPU; stage 1 is trained first. Prints a table in Markdown.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

REPOSITORY = Path(__file__).parents[1]
AMP = {"float32": [], "fp16": ["train.amp=True"], "bf16": ["train.amp=True", 'train.mixed_precision_type="bf16"']}


def train(stage: str, folder: Path, root: Path, *bindings: str) -> Path:
    """Runs one stage on the sample and returns its run folder."""
    command = [sys.executable, f"train_{stage}.py", f"configs/{stage}_sample.gin"]
    for binding in (f'train.dataset_folder="{folder}/data"', f'train.save_dir_root="{root}"', *bindings):
        command += ["--gin", binding]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr}")
    return root


def validation_loss(root: Path) -> float:
    rows = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "valid" and "loss" in row][-1]


def last_weights(root: Path) -> str:
    name = (root / "checkpoints" / "LAST").read_text().strip()
    return hashlib.sha256((root / "checkpoints" / name / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=5, help="runs that share the GPU")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: there is no GPU; fp16 needs one")
    with TemporaryDirectory() as name, ThreadPoolExecutor(arguments.at_once) as pool:
        folder = Path(name)
        train("rqvae", folder, folder / "rqvae")
        common = (f'train.pretrained_rqvae_path="{folder}/rqvae"', f"train.iterations={arguments.iterations}")
        runs = [(precision, seed) for precision in AMP for seed in range(arguments.seeds)] + [("float32", "again")]

        def one(run: tuple[str, int | str]) -> Path:
            precision, seed = run
            number = 0 if seed == "again" else seed
            bindings = (*common, *AMP[precision], f"train.seed={number}")
            return train("decoder", folder, folder / f"{precision}_{seed}", *bindings)

        roots = dict(zip(runs, pool.map(one, runs), strict=True))
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.iterations} steps\n")
        print("| precision | validation loss, mean | standard deviation | each seed |\n|---|---|---|---|")
        for precision in AMP:
            losses = [validation_loss(roots[precision, seed]) for seed in range(arguments.seeds)]
            spread = statistics.stdev(losses) if len(losses) > 1 else float("nan")
            each = ", ".join(f"{loss:.4f}" for loss in losses)
            print(f"| {precision} | {statistics.mean(losses):.4f} | {spread:.4f} | {each} |")
        same = last_weights(roots["float32", 0]) == last_weights(roots["float32", "again"])
        print(f"\nThe same float32 run twice: weights {'equal' if same else 'not equal'} bit for bit")


if __name__ == "__main__":
    main()
