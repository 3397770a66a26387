"""Stage 1: trains an RQ-VAE on item features and gives every item a unique semantic ID.

    python train_rqvae.py configs/rqvae_sample.gin

Leaves <save_dir_root>/tokenizer with the model and semantic_ids.safetensors, which train_decoder.py reads.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import gin
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast, set_seed

from data.cooccurrence import CoOccurrenceSvd  # noqa: F401  (named in configs)
from data.encoders import SentenceEncoder, TfidfSvd  # noqa: F401  (named in configs)
from data.features import FeatureSource, item_features
from data.processed import RecDataset, load_corpus
from data.splits import draw_splits
from data.utils import Shuffler, derive_seed
from data.vectors import Vectors  # noqa: F401  (named in configs)
from modules.rqvae import RqVae
from modules.tokenizer.semids import SemanticIds
from training import cli, distributed, plots, report
from training.health import Health
from training.metrics import codebook_usage, collision_rate
from training.run import Run
from training.schedule import due, warmup_cosine
from training.signals import Stopped, StopSignal

KMEANS_ROWS = 20_000  # rows the first codebooks are fitted on


@gin.configurable
def train(
    dataset: RecDataset = gin.REQUIRED,
    features: Sequence[FeatureSource] = gin.REQUIRED,
    dataset_folder: str = "dataset",
    dataset_split: str = "",
    split: str = "leave-one-out",
    categories: bool = False,
    save_dir_root: str = "out/rqvae_{corpus}",
    iterations: int = 20_000,
    batch_size: int = 1024,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup_steps: int = 200,
    max_gradient_norm: float = 1.0,
    gumbel_temperature: tuple[float, float] = (1.0, 0.1),
    refit_every: int = 1000,
    gradient_accumulate_every: int = 1,
    amp: bool = False,
    mixed_precision_type: str = "fp16",
    log_every: int = 100,
    eval_every: int = 1000,
    save_model_every: int = 5000,
    keep_checkpoints: int = 3,
    resume: bool = True,
    wandb_logging: bool = False,
    wandb_project: str = "generative-retrieval",
    force_dataset_process: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Trains the tokenizer of one corpus and returns what metrics.json holds.

    dataset, dataset_folder, dataset_split: see `data.processed.load_corpus`. features: what describes the items,
    e.g. [@TfidfSvd()]; categories: append them as multi-hot columns. split: "leave-one-out" or "temporal"; features
    read its training data only. save_dir_root: "{corpus}" stands for the corpus name. batch_size: items a micro-step
    over all processes. gumbel_temperature: first and last, geometric in between (Gumbel-softmax only).
    refit_every: steps between k-means fits of the codebooks to the current encoder, the last after the end; 0: never.
    mixed_precision_type: "fp16" or "bf16", used if amp. *_every: in steps.
    """
    accelerator = distributed.start(amp, mixed_precision_type, gradient_accumulate_every)
    device = accelerator.device
    with distributed.in_turn(accelerator):
        force = force_dataset_process and accelerator.is_local_main_process
        corpus = load_corpus(dataset, dataset_folder, dataset_split, force)
    splits = draw_splits(split, corpus.interactions)
    described = item_features(corpus, features, dataset_folder, splits.train_lengths, force_dataset_process, categories)
    run = Run(
        save_dir_root.format(corpus=corpus.name),
        {"corpus": corpus.hash, "features": described.identity},
        accelerator,
        keep_checkpoints,
        wandb_project if wandb_logging else None,
        resume,
    )
    x = torch.from_numpy(described.values).to(device)  # [N, D]

    set_seed(seed)
    model = RqVae(input_dim=x.shape[1], n_cat_features=described.n_cat_features).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randperm(len(x), generator=generator, device=device)[:KMEANS_ROWS]
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    first = run.restore(model, optimizer)["step"]
    if first == 0:
        model.initialize(x[rows], generator)
    run.save_config()
    prepared, optimizer = accelerator.prepare(model, optimizer)

    report.heading(
        "Tokenizer",
        corpus=f"{corpus.name}: {corpus.n_items:,} items, features {x.shape[1]} ({described.identity}), "
        f"{splits.name} split",
        model=f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}",
        folder=run.root,
        start=f"step {first:,} of {iterations:,}",
        show=accelerator.is_main_process,
    )
    shuffler = Shuffler(len(x), batch_size * gradient_accumulate_every, seed)
    n_shares = accelerator.num_processes * gradient_accumulate_every
    shuffler.check_shares(n_shares)
    health = Health(accelerator, shuffler, run.checkpoints)
    names = ("loss", "reconstruction_loss", "quantize_loss")
    bar = report.progress(iterations, first, accelerator.is_main_process)
    model.train()
    with StopSignal(accelerator.num_processes) as stop:
        for step in range(first, iterations):
            torch.manual_seed(derive_seed(seed, "noise", step, accelerator.process_index))
            factor = warmup_cosine(step, warmup_steps, iterations)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
            start, end = gumbel_temperature
            temperature = start * (end / start) ** (step / iterations)
            index, _ = shuffler.draw(step)
            means = torch.zeros(len(names), device=device)  # this process's part of the step's losses
            for share in index.tensor_split(n_shares)[accelerator.process_index :: accelerator.num_processes]:
                with accelerator.accumulate(prepared):
                    losses = prepared(x[share.to(device)], temperature)
                    weight = len(share) / len(index)  # shares may differ by one row
                    accelerator.backward(losses.loss * weight * n_shares)
                    means += torch.stack([getattr(losses, name) for name in names]).detach() * weight
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(prepared.parameters(), max_gradient_norm)
                    optimizer.step()
                    optimizer.zero_grad()
            done = step + 1
            health.watch(done, means[0], norm)
            bar.update()

            if refit_every and due(done, refit_every, iterations):
                refit(model, x[rows], optimizer, derive_seed(seed, "refit", step))
            if due(done, log_every, iterations):
                values = dict(zip(names, accelerator.reduce(means, "sum").tolist(), strict=True))
                values |= {"gradient_norm": float(norm), "learning_rate": learning_rate * factor}
                values |= report.machine(bar, shuffler.batch_size, accelerator)
                run.log(done, "train", values)
                report.show(bar, values)
                health.check(model)
            if due(done, eval_every, iterations):
                run.log(done, "catalogue", catalogue_metrics(model, x))
            signum = stop.after_step()
            if signum or due(done, save_model_every, iterations):
                health.check(model)
                run.save(done, model, optimizer, best={}, improved=False)
            if signum:
                bar.close()
                run.close(status=128 + signum)
                distributed.end(accelerator)
                raise Stopped(signum, done)
    bar.close()

    metrics = catalogue_metrics(model, x)
    if accelerator.is_main_process:
        semantic_ids = save_tokenizer(
            run.root / "tokenizer", model, model.codes(x), corpus, described.identity, splits.name
        )
        metrics["extra_level_size"] = semantic_ids.level_sizes[-1]
        plots.tokenizer(run.root)
    run.finish(metrics)
    report.table("Semantic IDs", metrics, run.root, show=accelerator.is_main_process)
    distributed.end(accelerator)
    return metrics


def refit(model: RqVae, x: torch.Tensor, optimizer: AcceleratedOptimizer, seed: int) -> None:
    """Fits the codebooks to rows x [N, D] as the encoder sees them now, the same on every process."""
    model.fit_codebooks(x, torch.Generator(x.device).manual_seed(seed))
    for layer in model.layers:
        broadcast(layer.codebook.data)
        for moment in optimizer.state.get(layer.codebook, {}).values():
            moment.zero_()  # of other codes; Adam's step count starts again with them


def catalogue_metrics(model: RqVae, x: torch.Tensor) -> dict[str, float]:
    """Losses over all items, usage and entropy of each level, and how many items share all their codes."""
    codes = model.codes(x)
    usage = codebook_usage(codes, model.config["codebook_size"])
    return {**model.losses(x), **usage, "collision_rate": collision_rate(codes)}


def save_tokenizer(folder: Path, model: RqVae, codes: torch.Tensor, corpus, features: str, split: str) -> SemanticIds:
    """Writes the model and the catalogue's semantic IDs."""
    model.save_pretrained(folder)
    weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:16]
    identity = {"weights": weights, "features": features, "split": split, "config": json.dumps(model.config)}
    size = model.config["codebook_size"]
    semantic_ids = SemanticIds.from_codes(codes, size, corpus.item_keys, corpus.name, corpus.hash, identity)
    semantic_ids.save(folder / "semantic_ids.safetensors")
    return semantic_ids


if __name__ == "__main__":
    cli.run(train, __doc__)
