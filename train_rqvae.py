"""Stage 1: trains an RQ-VAE on item features and gives every item a unique semantic ID.

    python train_rqvae.py configs/rqvae_sample.gin

Leaves <save_dir_root>/tokenizer with the model, the fitted feature sources, semantic_ids.safetensors and features.npy;
train_decoder.py reads the latter two.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import gin
import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt, SkipValidation

from data.cooccurrence import CoOccurrenceSvd  # noqa: F401  (named in configs)
from data.encoders import SentenceEncoder, TfidfSvd  # noqa: F401  (named in configs)
from data.features import FeatureSource, item_features
from data.files import write_file
from data.parameters import Rate, Share, checked
from data.processed import RecDataset, load_corpus
from data.sources import FittedSources
from data.splits import draw_splits
from data.utils import Shuffler, derive_seed, seed_noise
from data.vectors import Vectors  # noqa: F401  (named in configs)
from modules.card import tokenizer_card
from modules.pretrained import CARD, HUB_ID, push_folder
from modules.rqvae import RqVae
from modules.tokenizer.catalogue import catalogue_codes, encoder_features, make_ids, reconstruction_error
from modules.tokenizer.semids import FEATURES, IDS, SemanticIds
from ops.jagged import runs_kernels
from training import cli, distributed, plots, report
from training.graph import TokenizerStep
from training.health import Health
from training.metrics import codebook_usage, collisions, neighbour_agreement
from training.run import Run
from training.schedule import due, warmup_cosine
from training.signals import Stopped, StopSignal

KMEANS_ROWS = 20_000  # rows the first codebooks are fitted on


@gin.configurable
@checked("train")
def train(
    dataset: RecDataset = gin.REQUIRED,
    features: Sequence[SkipValidation[FeatureSource]] = gin.REQUIRED,
    dataset_folder: str = "dataset",
    dataset_split: str = "",
    split: str = "leave-one-out",
    categories: bool = False,
    save_dir_root: str = "out/rqvae_{corpus}",
    iterations: NonNegativeInt = 20_000,
    batch_size: PositiveInt = 1024,
    learning_rate: Rate = 1e-3,
    weight_decay: Rate = 0.01,
    warmup_steps: NonNegativeInt = 200,
    max_gradient_norm: Rate = 1.0,
    gumbel_temperature: tuple[PositiveFloat, PositiveFloat] = (1.0, 0.1),
    refit_every: NonNegativeInt = 1000,
    min_usage: Share = 0.9,
    collapse_is_error: bool = True,
    gradient_accumulate_every: PositiveInt = 1,
    amp: bool = False,
    mixed_precision_type: Literal["fp16", "bf16"] = "fp16",
    log_every: NonNegativeInt = 100,
    eval_every: NonNegativeInt = 1000,
    save_model_every: NonNegativeInt = 5000,
    keep_checkpoints: PositiveInt = 3,
    resume: bool = True,
    push_vae_to_hf: bool = False,
    vae_hf_model_name: str = "",
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
    min_usage: share of a level's codes in use at the end below which the tokenizer counts as collapsed: an error, or a
    warning if not collapse_is_error. push_vae_to_hf: upload the tokenizer folder to the Hub as vae_hf_model_name.
    mixed_precision_type: "fp16" or "bf16", used if amp. *_every: in steps.
    """
    settings = dict(locals())
    if push_vae_to_hf and not HUB_ID.fullmatch(vae_hf_model_name):
        raise ValueError("train.push_vae_to_hf needs train.vae_hf_model_name, a Hub repository (owner/name).")
    accelerator = distributed.start(amp, mixed_precision_type, gradient_accumulate_every)
    device = accelerator.device
    with distributed.in_turn(accelerator):
        force = force_dataset_process and accelerator.is_local_main_process
        corpus = load_corpus(dataset, dataset_folder, dataset_split, force)
    splits = draw_splits(split, corpus.interactions)
    corpus.interactions = splits.interactions
    described = item_features(
        corpus, features, dataset_folder, splits.train_lengths, force_dataset_process, categories, splits.name
    )
    x = torch.from_numpy(described.values).to(device)  # [N, D]

    set_seed(seed)
    columns = {"n_cat_features": described.n_cat_features, "from_interactions": described.from_interactions}
    model = RqVae(input_dim=x.shape[1], **columns).to(device)
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randperm(len(x), generator=generator, device=device)[:KMEANS_ROWS]
    # One process in full precision on a GPU replays its step as a CUDA graph.
    graphed = runs_kernels(device) and accelerator.num_processes * gradient_accumulate_every == 1 and not amp
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay, fused=True)
    run = Run(
        save_dir_root.format(corpus=corpus.name),
        settings,
        {"corpus": corpus.hash, "features": described.identity, "split": splits.name},
        accelerator,
    )
    first = run.restore(model, optimizer)["step"]
    if first == 0:
        model.initialize(x[rows], generator)
    distributed.weights_from_main(model)  # k-means may round differently on other machines
    run.save_config()
    plain_optimizer = optimizer
    optimizer = accelerator.prepare(optimizer)

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
    bar, speed = report.progress(iterations, first, accelerator.is_main_process), report.Speed()
    if first == 0:
        run.log(0, "catalogue", catalogue_metrics(model, x))
    model.train()
    if graphed:
        replay = TokenizerStep(model, plain_optimizer, x, shuffler.batch_size, max_gradient_norm)
    with StopSignal(accelerator.num_processes) as stop:
        for step in range(first, iterations):
            speed.start()
            seed_noise(derive_seed(seed, "noise", step, accelerator.process_index), device)
            factor = warmup_cosine(step, warmup_steps, iterations)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
            start, end = gumbel_temperature
            temperature = start * (end / start) ** (step / iterations)
            index, _ = shuffler.draw(step)
            if graphed:
                means, norm = replay(index, learning_rate * factor, temperature)
            else:
                means = torch.zeros(len(names), device=device)  # this process's part of the step's losses
            shares = [] if graphed else index.tensor_split(n_shares)
            for share in shares[accelerator.process_index :: accelerator.num_processes]:
                with accelerator.accumulate():
                    with accelerator.autocast():
                        losses = model(x[share.to(device)], temperature)
                    weight = len(share) / len(index)  # shares may differ by one row
                    accelerator.backward(losses.loss * weight * gradient_accumulate_every)
                    means += torch.stack([getattr(losses, name) for name in names]).detach() * weight
                    if accelerator.sync_gradients:
                        distributed.sum_gradients(model.parameters(), accelerator)
                        norm = accelerator.clip_grad_norm_(model.parameters(), max_gradient_norm)
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
                values |= report.machine(speed.steps_per_second() * shuffler.batch_size, accelerator)
                run.log(done, "train", values)
                report.show(bar, values)
                health.check(model)
            speed.stop()
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

    codes = catalogue_codes(model, x)
    metrics = {**catalogue_metrics(model, x), **id_metrics(model, codes, x)}
    if accelerator.is_main_process:
        folder = run.root / "tokenizer"
        folder.mkdir(exist_ok=True)
        seen = encoder_features(model, x, ~described.from_interactions, folder / FEATURES)
        semantic_ids = make_ids(model, codes, corpus, described.identity, splits.name, seen)
        metrics["extra_level_size"] = sum(semantic_ids.level_sizes[codes.shape[1] :])  # 0: the codes are unique
        save_tokenizer(folder, model, semantic_ids, described.fitted, metrics)
        plots.tokenizer(run.root)
        plots.codes(run.root, codes.cpu(), model.config["codebook_size"], corpus.items["categories"].to_list())
    run.finish(metrics)
    report.table("Semantic IDs", metrics, run.root, show=accelerator.is_main_process)
    report.verdict(metrics, min_usage, collapse_is_error, show=accelerator.is_main_process)
    if push_vae_to_hf and accelerator.is_main_process:
        print(f"Uploaded to {push_folder(run.root / 'tokenizer', vae_hf_model_name)}")
    distributed.end(accelerator)
    return metrics


def refit(model: RqVae, x: torch.Tensor, optimizer: AcceleratedOptimizer, seed: int) -> None:
    """Fits the codebooks to rows x [N, D] as the encoder sees them now, the same on every process."""
    model.fit_codebooks(x, torch.Generator(x.device).manual_seed(seed))
    distributed.weights_from_main(model.layers)
    for layer in model.layers:
        for parameter in layer.parameters():
            for moment in optimizer.state.get(parameter, {}).values():
                moment.zero_()  # of other codes; Adam's step count starts again with them


def catalogue_metrics(model: RqVae, x: torch.Tensor) -> dict[str, float]:
    """Of all items by their nearest codes: losses, usage and perplexity of each level, collisions."""
    codes = model.codes(x)
    return {**model.losses(x), **codebook_usage(codes, model.config["codebook_size"]), **collisions(codes)}


def id_metrics(model: RqVae, codes: torch.Tensor, x: torch.Tensor) -> dict[str, float]:
    """Of the codes [N, L] of items x [N, D]: uniqueness, reconstruction, and which neighbours share a prefix."""
    error = reconstruction_error(model, x, codes)
    unique = {f"id_{name}": value for name, value in collisions(codes).items()}
    return {**unique, "id_reconstruction_loss": error, **neighbour_agreement(codes, x)}


def save_tokenizer(
    folder: Path, model: RqVae, semantic_ids: SemanticIds, sources: FittedSources, metrics: dict
) -> None:
    """Writes the model, what makes its features, the catalogue's semantic IDs and the card."""
    model.save_pretrained(folder)
    sources.save(folder)
    semantic_ids.save(folder / IDS)
    made_of = semantic_ids.corpus_name, semantic_ids.n_items, sources.identity
    write_file(folder / CARD, tokenizer_card(model.config, *made_of, metrics).encode())


if __name__ == "__main__":
    cli.run(train, __doc__)
