"""A tiny data set in the Amazon layout that a working pipeline must learn, and a way to run the scripts on it."""

import gzip
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import gin
import pytest

import train_decoder
import train_rqvae

REPOSITORY = Path(__file__).parents[1]
N_ITEMS, N_USERS = 30, 400
COLOURS = ("red", "green", "blue", "black", "white", "yellow")
THINGS = ("ball", "lamp", "shoe", "book", "chair")


def write_raw(folder: Path, split: str = "beauty", step: int = 7) -> None:
    """Every user walks through the items with one stride, from which the next item follows, and jumps at times:
    the last item tells the next one, the first item and the position don't. The last three steps are walked."""
    raw = folder / "raw" / split
    raw.mkdir(parents=True)
    draw, lines = random.Random(0), []
    for user in range(N_USERS):
        items = [draw.randrange(N_ITEMS)]
        for left in reversed(range(5 + user % 6)):
            jumps = left >= 3 and draw.random() < 0.3
            items.append(draw.randrange(N_ITEMS) if jumps else (items[-1] + step) % N_ITEMS)
        lines.append(" ".join(str(number + 1) for number in [user, *items]))
    (raw / "sequential_data.txt").write_text("\n".join(lines) + "\n")
    ids = {f"item{n:02d}": str(n + 1) for n in range(N_ITEMS)}
    users = {f"user{n:02d}": str(n + 1) for n in range(N_USERS)}
    maps = {
        "user2id": users,
        "item2id": ids,
        "id2user": {number: key for key, number in users.items()},
        "id2item": {number: key for key, number in ids.items()},
    }
    (raw / "datamaps.json").write_text(json.dumps(maps))
    with gzip.open(raw / "meta.json.gz", "wt") as file:
        for n, key in enumerate(ids):
            title = f"{COLOURS[n % 6]} {THINGS[n // 6]}"
            file.write(f"{{'asin': '{key}', 'title': '{title}', 'categories': [['{THINGS[n // 6]}']]}}\n")


def bindings(folder: Path, script: str, *extra: str) -> list[str]:
    """A small config of one stage; `extra` bindings come last."""
    common = [
        "train.dataset = %data.processed.RecDataset.AMAZON",
        f'train.dataset_folder = "{folder}"',
        'train.dataset_split = "beauty"',
        f'train.save_dir_root = "{folder}/out/{script}"',
    ]
    stages = {
        "rqvae": [
            "train.features = [@TfidfSvd()]",
            "TfidfSvd.dim = 8",
            "train.iterations = 60",
            "train.batch_size = 16",
            "train.refit_every = 20",
            "train.eval_every = 30",
            "train.log_every = 10",
            "train.save_model_every = 20",
            "RqVae.codebook_size = 6",
            "RqVae.n_layers = 2",
            "RqVae.embed_dim = 8",
            "RqVae.hidden_dims = (16,)",
            "RqVae.separate_collisions = False",
        ],
        "decoder": [
            f'train.pretrained_rqvae_path = "{folder}/out/rqvae"',
            "train.iterations = 300",
            "train.batch_size = 16",
            "train.learning_rate = 1e-2",
            "train.warmup_steps = 10",
            'train.item_columns = ("categories",)',
            "train.log_every = 10",
            "train.partial_eval_every = 100",
            "train.full_eval_every = 100",
            "train.save_model_every = 25",
            "EncoderDecoderRetrievalModel.dim = 32",
            "EncoderDecoderRetrievalModel.ff_dim = 64",
            "EncoderDecoderRetrievalModel.n_heads = 2",
            "EncoderDecoderRetrievalModel.head_dim = 16",
            "EncoderDecoderRetrievalModel.encoder_layers = 1",
            "EncoderDecoderRetrievalModel.dropout = 0.0",
        ],
    }
    return [*common, *stages[script], *extra]


def run(folder: Path, script: str, *extra: str) -> dict[str, float]:
    """Runs one stage in this process."""
    gin.clear_config()
    # Both scripts have a `train`; where both are imported, gin wants to know whose is meant.
    config = bindings(folder, script, *extra)
    gin.parse_config([f"train_{script}.{line}" if line.startswith("train.") else line for line in config])
    try:
        return {"rqvae": train_rqvae, "decoder": train_decoder}[script].train()
    finally:
        gin.clear_config()


def launch(folder: Path, script: str, *extra: str, processes: int = 2) -> dict[str, float]:
    """Runs one stage in several processes on the CPU and returns its metrics.json.

    By torchrun: `accelerate launch --cpu` starts one process, whatever the number asked for.
    """
    config = folder / f"{script}.gin"
    config.write_text("\n".join(bindings(folder, script, *extra)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [f"train_{script}.py", str(config), "--traceback"]
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    root = next(line for line in reversed(config.read_text().splitlines()) if "save_dir_root" in line).split('"')[1]
    return json.loads((Path(root) / "metrics.json").read_text())


def lines(path: Path) -> list[dict]:
    """metrics.jsonl, without what the clock says."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    clock = ("time", "examples_per_second")
    return [{name: value for name, value in row.items() if name not in clock} for row in rows]


TIGER = (  # TIGER's layout of the model, which generates by beam search
    "EncoderDecoderRetrievalModel.item_tokens = False",
    'EncoderDecoderRetrievalModel.node_parts = ("codes",)',
    "EncoderDecoderRetrievalModel.decoder_layers = 1",
    "EncoderDecoderRetrievalModel.tree_loss = 1.0",
    "train.exact = False",
    "train.beams = 10",
    "train.top_k = (1, 5, 10)",
)


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with the raw data and both stages run on it."""
    folder = tmp_path_factory.mktemp("pipeline")
    write_raw(folder)
    run(folder, "rqvae")
    run(folder, "decoder")
    return folder
