"""Stage 1: trains an RQ-VAE on item features and gives every item a unique semantic ID.

    python train_rqvae.py configs/rqvae_sample.gin

Leaves <save_dir_root>/tokenizer with the model, the fitted feature sources, semantic_ids.safetensors and features.npy;
train_decoder.py reads the latter two.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load

from pathlib import Path
from typing import Literal

import gin
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from common.files import write_file
from common.parameters import (
    CorpusPath,
    Name,
    NonNegativeInt,
    PathName,
    PositiveFloat,
    PositiveInt,
    Rate,
    Seed,
    Share,
    configurable,
)
from data.features import Sources, item_features
from data.processed import RecDataset
from data.shuffle import Shuffler, derive_seed, seed_noise
from data.sources import FittedSources
from data.splits import SplitKind
from modules.card import tokenizer_card
from modules.pretrained import CARD, HUB_ID, push_folder
from modules.rqvae import RqVae
from modules.tokenizer.catalogue import catalogue_codes, encoder_features, make_ids, reconstruction_error
from modules.tokenizer.semids import FEATURES, IDS, SemanticIds
from ops.dispatch import has_kernel
from ops.precision import matmul_precision
from training import cli, distributed, plots, report
from training.flat import FlatParameters
from training.metrics import codebook_usage, collisions, neighbour_agreement
from training.replay import Replay
from training.run import Run, load_splits
from training.schedule import due, warmup_cosine
from training.sharded import ShardedAdamW
from training.steps import Steps

KMEANS_ROWS = 20_000  # rows the first codebooks are fitted on


@configurable
def train(
    dataset: RecDataset = gin.REQUIRED,
    features: Sources = gin.REQUIRED,
    dataset_folder: PathName = "dataset",
    dataset_split: str = "",
    split: SplitKind = "leave-one-out",
    categories: bool = False,
    save_dir_root: CorpusPath = "out/rqvae_{corpus}",
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
    wandb_project: Name = "generative-retrieval",
    force_dataset_process: bool = False,
    seed: Seed = 0,
) -> dict[str, float]:
    """Trains the tokenizer of one corpus and returns what metrics.json holds.

    dataset, dataset_folder, dataset_split: see `data.processed.load_corpus`. features: what describes the items,
    e.g. [@TfidfSvd()]; categories: append them as multi-hot columns. split: "leave-one-out" or "temporal"; features
    read its training data only. save_dir_root: "{corpus}" stands for the corpus name. batch_size: items per micro-step
    over all processes. gumbel_temperature: first and last, geometric in between (Gumbel-softmax only).
    refit_every: steps between k-means fits of the codebooks to the current encoder, the last after the end; 0: never.
    min_usage: share of a level's codes in use at the end below which the tokenizer counts as collapsed: an error, or a
    warning if not collapse_is_error. push_vae_to_hf: upload the tokenizer folder to the Hub as vae_hf_model_name.
    mixed_precision_type: "fp16" or "bf16", used if amp. *_every: in steps.
    """
    settings = dict(locals())
    if push_vae_to_hf and not HUB_ID.fullmatch(vae_hf_model_name):
        raise ValueError("train.push_vae_to_hf needs train.vae_hf_model_name, a Hub repository (owner/name).")
    # Input
    accelerator = distributed.start(amp, mixed_precision_type)
    device, is_main = accelerator.device, accelerator.is_main_process
    data = dataset, dataset_folder, dataset_split, split, force_dataset_process
    corpus, splits = load_splits(*data, accelerator)
    described = item_features(
        corpus, features, dataset_folder, splits.train_lengths, force_dataset_process, categories, splits.name
    )
    x = torch.from_numpy(described.values).to(device)  # [N, D]
    shuffler = Shuffler(len(x), batch_size * gradient_accumulate_every, seed)

    # Model and optimizer
    set_seed(seed)
    fitted = described.fitted
    model = RqVae(x.shape[1], n_cat_features=fitted.n_cat_features, from_interactions=fitted.from_interactions)
    model.to(device).train()
    if (size := model.config["codebook_size"]) > (n_rows := min(len(x), KMEANS_ROWS)):
        raise ValueError(f"RqVae.codebook_size = {size} is more than the {n_rows} items that codes are fitted to.")
    flats = codebooks, _ = flat_parameters(model)
    optimizer = ShardedAdamW(flats, learning_rate, (weight_decay, weight_decay))
    inputs = {"corpus": corpus.hash, "features": fitted.identity, "split": splits.name}
    run = Run(save_dir_root.format(corpus=corpus.name), settings, inputs, accelerator)
    start_step = run.restore(model, optimizer)["step"]
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.randperm(len(x), generator=generator, device=device)[:KMEANS_ROWS]
    if start_step == 0:
        model.initialize(x[rows], generator)
    distributed.weights_from_main(model)  # k-means may round differently on other machines
    run.save_config()
    replay = recorded_passes(model, x, flats, shuffler.batch_size, accelerator)

    # Loop
    about = f"{corpus.n_items:,} items, features {x.shape[1]} ({fitted.identity}), {splits.name} split"
    start = f"step {start_step:,} of {iterations:,}"
    if is_main:
        report.heading("Tokenizer", {"corpus": f"{corpus.name}: {about}"}, model, run.root, start)
    if start_step == 0:
        run.log(0, "catalogue", catalogue_metrics(model, x))
    latest: dict[str, float] = {}  # figures of the catalogue, after the last step those of the final weights
    names = ("loss", "reconstruction_loss", "quantize_loss")
    with Steps(run, model, optimizer, shuffler, names, start_step) as steps:
        for step in range(start_step, iterations):
            steps.start(learning_rate * warmup_cosine(step, warmup_steps, iterations))
            seed_noise(derive_seed(seed, "noise", step, accelerator.process_index), device)
            hot, cold = gumbel_temperature
            temperature = torch.tensor(hot * (cold / hot) ** (step / iterations))
            index, _ = shuffler.draw(step)
            step_losses = torch.zeros(len(names), device=device)  # this process's part
            for share in steps.shares(index):
                step_losses += replay(len(share), share, temperature)
            norm = optimizer.update(max_gradient_norm, accelerator.scaler)

            if refit_every and due(step + 1, refit_every, iterations):
                refit(model, x[rows], optimizer, codebooks, derive_seed(seed, "refit", step))
            steps.made(step + 1, step_losses, norm, replay.recording)
            if due(step + 1, eval_every, iterations):
                run.log(step + 1, "catalogue", latest := catalogue_metrics(model, x))
            steps.end(step + 1, iterations)

    # Semantic IDs
    codes = catalogue_codes(model, x)
    metrics = {
        **(latest or catalogue_metrics(model, x)),
        **{f"id_{name}": value for name, value in collisions(codes).items()},
    }
    metrics |= {"id_reconstruction_loss": reconstruction_error(model, x, codes), **neighbour_agreement(codes, x)}
    if is_main:
        folder = run.root / "tokenizer"
        folder.mkdir(exist_ok=True)
        seen = encoder_features(model, x, ~fitted.from_interactions, folder / FEATURES)
        semantic_ids = make_ids(model, codes, corpus, fitted.identity, splits.name, seen)
        metrics["extra_level_size"] = sum(semantic_ids.level_sizes[codes.shape[1] :])  # 0: the codes are unique
        save_tokenizer(folder, model, semantic_ids, fitted, metrics)
        plots.tokenizer(run.root)
        plots.codes(run.root, codes.cpu(), model.config["codebook_size"], corpus.categories())
    run.finish(metrics)
    if is_main:
        report.table("Semantic IDs", metrics, run.root)
    report.verdict(metrics, min_usage, collapse_is_error, show=is_main)
    if push_vae_to_hf and is_main:
        print(f"Uploaded to {push_folder(run.root / 'tokenizer', vae_hf_model_name)}")
    distributed.end(accelerator)
    return metrics


def flat_parameters(model: RqVae) -> tuple[FlatParameters, FlatParameters]:
    """Those of the codebooks, whose moments a refit clears, and those of encoder and decoder."""
    coders = [*model.encoder.parameters(), *model.decoder.parameters()]
    return FlatParameters(model.layers.parameters()), FlatParameters(coders)


def recorded_passes(
    model: RqVae, x: torch.Tensor, flats: tuple[FlatParameters, ...], batch_size: int, accelerator: Accelerator
) -> Replay:
    """Passes over items x [N, D], as `replay(size, index [size], temperature [])`, which returns their part of a
    step's mean losses: total, reconstruction, quantization.

    A process alone on a GPU replays them as a CUDA graph, with matrix products in TF32. The standardization is that of
    now.
    """
    recorded = has_kernel(x.device) and accelerator.num_processes == 1
    normalized = model.normalized(x)

    def passes(size: int, index: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
        weight = size / batch_size
        with matmul_precision("high" if recorded else "highest"):
            with accelerator.autocast():
                losses = model.autoencode(normalized.index_select(0, index), temperature)
            accelerator.backward(losses.loss * weight)
        for flat in flats:
            flat.collect_grads()
        return torch.stack([losses.loss, losses.reconstruction_loss, losses.quantize_loss]).detach() * weight

    return Replay(passes, [flat.flat for flat in flats], x.device, recorded, model.state_dict().values())


def refit(model: RqVae, x: torch.Tensor, optimizer: ShardedAdamW, codebooks: FlatParameters, seed: int) -> None:
    """Fits the codebooks to rows x [N, D] as the encoder sees them now, the same on every process."""
    model.fit_codebooks(x, torch.Generator(x.device).manual_seed(seed))
    distributed.weights_from_main(model.layers)
    optimizer.forget(codebooks)  # moments of other codes; Adam's step count starts again with them


def catalogue_metrics(model: RqVae, x: torch.Tensor) -> dict[str, float]:
    """Of all items by their nearest codes: losses, usage and perplexity of each level, collisions."""
    codes = model.codes(x)
    usage = codebook_usage(codes, model.config["codebook_size"])
    return {**model.losses(x), **usage, **collisions(codes.to(x.device))}


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
