"""The tokenizer over modes, seeds and data sets; its survival over learning rates and batches; its speed.

    python -m benchmarks.tokenizer table --features beauty=beauty.npy toys=toys.npy --seeds 0 1 2
    python -m benchmarks.tokenizer grid --features beauty=beauty.npy
    python -m benchmarks.tokenizer speed --profile
    python -m benchmarks.tokenizer tokenize --items 1000000 --dim 384 --folder /tmp

Features are [N, D] float32 in .npy files or .safetensors with a tensor "features"; train_rqvae.py caches those of a
config under <dataset_folder>/features. Prints Markdown; --json FILE appends every run as one line.
"""

import argparse
import json
import time

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.tokenizer_speed import speed, stepper, tokenize
from data.shuffle import Shuffler, derive_seed, seed_noise
from modules.quantize import QuantizeMode
from modules.rqvae import RqVae
from modules.tokenizer.catalogue import catalogue_codes, reconstruction_error
from train_rqvae import refit
from training.metrics import codebook_usage, collisions, neighbour_agreement
from training.schedule import due, warmup_cosine

MODES: dict[str, dict] = {  # what differs from the recommended config, configs/rqvae_amazon.gin
    "rotation": {},
    "ste": {"codebook_mode": QuantizeMode.STE},
    "gumbel": {"codebook_mode": QuantizeMode.GUMBEL_SOFTMAX},
    "simvq": {"codebook_sim_vq": True},
    "ema": {"codebook_update": "ema"},
    "kmeans": {"hidden_dims": None},
}
RECOMMENDED = {"embed_dim": 10, "hidden_dims": (512, 256, 128), "codebook_size": 256, "n_layers": 3}
RATES, BATCHES = (1e-4, 1e-3, 1e-2), (64, 640, 4096)


def train(x: Tensor, options: dict, seed: int, steps: int, batch: int, rate: float, refit_every: int) -> RqVae:
    """The loop of train_rqvae.py without its log, on the device of x."""
    torch.manual_seed(seed)
    model = RqVae(x.shape[1], **{**RECOMMENDED, **options}).to(x.device)
    model.initialize(x, torch.Generator(x.device).manual_seed(seed))
    if options.get("hidden_dims", ()) is None:
        return model
    shuffler = Shuffler(len(x), batch, seed)
    step_once, optimizer, codebooks = stepper(model.train(), x, shuffler.batch_size)
    for step in range(steps):
        seed_noise(derive_seed(seed, "noise", step, 0), x.device)
        step_once(shuffler.draw(step)[0], rate * warmup_cosine(step, 200, steps), 0.1 ** (step / steps))
        if due(step + 1, refit_every, steps):
            refit(model, x, optimizer, codebooks, derive_seed(seed, "refit", step))
    return model


def figures(model: RqVae, x: Tensor) -> dict[str, float]:
    """What the table shows of one run."""
    nearest, codes = model.codes(x), catalogue_codes(model, x)
    usage = codebook_usage(nearest, model.config["codebook_size"])
    return {
        "least usage": min(value for name, value in usage.items() if name.startswith("usage")),
        "least perplexity": min(value for name, value in usage.items() if name.startswith("perplexity")),
        "unique, nearest codes": collisions(nearest)["unique_share"],
        "largest group": collisions(nearest)["largest_group"],
        "unique": collisions(codes)["unique_share"],
        "loss, nearest codes": reconstruction_error(model, x, nearest),
        "loss": reconstruction_error(model, x, codes),
        **neighbour_agreement(codes, x),
    }


def experiment(features: dict[str, Tensor], options: argparse.Namespace) -> None:
    """All runs of `table` or `grid`, one Markdown line each."""
    grid = options.what == "grid"
    header = False
    for name, x in features.items():
        for mode in options.modes if not grid else ["rotation"]:
            for rate in RATES if grid else (options.rate,):
                for batch in BATCHES if grid else (options.batch,):
                    for seed in options.seeds:
                        start = time.perf_counter()
                        model = train(x, MODES[mode], seed, options.steps, batch, rate, options.refit_every)
                        row = {"data": name, "mode": mode, "rate": rate, "batch": batch, "seed": seed}
                        row |= figures(model, x) | {"seconds": time.perf_counter() - start}
                        if not header:
                            print("| " + " | ".join(row) + " |\n" + "|---" * len(row) + "|")
                        header = True
                        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
                        print("| " + " | ".join(cells) + " |", flush=True)
                        if options.json:
                            with open(options.json, "a") as file:
                                file.write(json.dumps(row | {"steps": options.steps}) + "\n")


def read(spec: str, device: torch.device) -> tuple[str, Tensor]:
    name, path = spec.split("=", 1)
    x = load_file(path)["features"] if path.endswith(".safetensors") else torch.from_numpy(np.load(path))
    return name, x.float().to(device)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["table", "grid", "speed", "tokenize"])
    parser.add_argument("--features", nargs="+", default=[], metavar="NAME=FILE")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--refit-every", type=int, default=250)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("--folder", default=None, help="where the features of `tokenize` are written")
    parser.add_argument("--cold", action="store_true", help="drop the features of `tokenize` from the page cache")
    parser.add_argument("--profile", action="store_true", help="`speed` shows the kernels of a step")
    parser.add_argument("--json")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    where = torch.device(arguments.device)
    if where.type == "cuda":
        from benchmarks.timing import heading

        heading()
    else:
        print(f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}")
    if arguments.what == "speed":
        speed(where, arguments.profile)
    elif arguments.what == "tokenize":
        tokenize(arguments.items, arguments.dim, RECOMMENDED, arguments.folder, arguments.cold, where)
    else:
        experiment(dict(read(spec, where) for spec in arguments.features), arguments)
