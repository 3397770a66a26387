"""Stage 2: trains a transformer that generates a user's next item down the tree of semantic IDs; Recall, NDCG and MRR.

    python train_decoder.py configs/decoder_sample.gin

Needs the tokenizer of the same corpus, from train_rqvae.py. The best checkpoint by validation NDCG is tested once.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load

import shutil
from functools import partial
from typing import Literal

import gin
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from common.files import write_file
from common.parameters import CorpusPath, Name, NonNegativeInt, PathName, PositiveInt, Rate, Seed, configurable
from data.batches import SequenceSource, bucket_size, padding_rows
from data.features import Sources, item_features
from data.processed import RecDataset
from data.shuffle import Shuffler, derive_seed, seed_noise
from data.splits import SplitKind, Splits, every_prefix, in_training, windows
from modules.card import pipeline_card
from modules.model import EncoderDecoderRetrievalModel
from modules.pretrained import CARD, HUB_ID, push_folder
from modules.serving.inspection import HELD_OUT, save_held_out
from modules.serving.pipeline import Pipeline
from modules.tokenizer.catalogue import load_or_make_ids
from modules.tokenizer.semids import SemanticIds
from modules.tokenizer.tokenizer import Tokenizer
from modules.tree import Tree
from ops.dispatch import has_kernel
from training import cli, distributed, plots, report
from training.baselines import baseline_ranks, sasrec_ranks, train_sasrec
from training.evaluate import Evaluation
from training.flat import FlatParameters
from training.metrics import CHOSEN, CHOSEN_K, all_figures, occurring, ranking_metrics, save_ranks, task_groups
from training.replay import Replay
from training.run import Run, load_splits
from training.schedule import due, last_step, warmup_cosine
from training.sharded import ShardedAdamW
from training.steps import Steps


@configurable
def train(
    dataset: RecDataset = gin.REQUIRED,
    dataset_folder: PathName = "dataset",
    dataset_split: str = "",
    split: SplitKind = "leave-one-out",
    pretrained_rqvae_path: CorpusPath = "./out/rqvae_{corpus}",
    pretrained_rqvae_revision: Name | None = None,
    features: Sources | None = None,
    encode_catalogue: bool = False,
    text_model: PathName | None = None,
    save_dir_root: CorpusPath = "out/decoder_{corpus}",
    iterations: PositiveInt = 20_000,
    batch_size: PositiveInt = 256,
    learning_rate: Rate = 1e-3,
    weight_decay: Rate = 0.05,
    warmup_steps: NonNegativeInt = 200,
    max_gradient_norm: Rate = 1.0,
    max_items: PositiveInt = 20,
    every_position: bool = True,
    exclude_history: bool = False,
    beams: PositiveInt = 50,
    exact: bool = True,
    top_k: tuple[PositiveInt, ...] = (1, 5, 10, 20, 50),
    patience: NonNegativeInt = 0,
    sasrec_baseline: bool = False,
    item_columns: tuple[Name, ...] = (),
    eval_batch_size: PositiveInt = 512,
    gradient_accumulate_every: PositiveInt = 1,
    amp: bool = False,
    mixed_precision_type: Literal["fp16", "bf16"] = "fp16",
    log_every: NonNegativeInt = 100,
    partial_eval_every: NonNegativeInt = 500,
    full_eval_every: NonNegativeInt = 2000,
    save_model_every: NonNegativeInt = 2000,
    keep_checkpoints: PositiveInt = 3,
    resume: bool = True,
    push_to_hf: bool = False,
    hf_model_name: str = "",
    wandb_logging: bool = False,
    wandb_project: Name = "generative-retrieval",
    force_dataset_process: bool = False,
    seed: Seed = 0,
) -> dict[str, float]:
    """Trains the retriever of one corpus and returns what metrics.json holds.

    dataset, dataset_folder, dataset_split: see `data.processed.load_corpus`. split: "leave-one-out" or "temporal",
    the tokenizer's. pretrained_rqvae_path: run or tokenizer folder, file of semantic IDs or index.json, or Hub id (at
    pretrained_rqvae_revision); in it and in save_dir_root "{corpus}" stands for the corpus name. encode_catalogue: the
    tokenizer gives this catalogue its IDs, by its own feature sources; text_model: where its sentence encoder lies now.
    features: only for a tokenizer without sources of its own (of the original project), or beside an index.json.
    batch_size: histories per micro-step over all processes. max_items: longest history. every_position: each
    item of a training window is a target given those before it; off: one target per history, as a
    bidirectional encoder needs. exclude_history: whether the best checkpoint, the heads' shares and the end are chosen
    by ranking items that the user has not consumed, or all items; the report has both. partial_eval_every: steps
    between validation losses; full_eval_every: between rankings of the validation split, by whose ndcg@10 the best
    checkpoint is chosen. patience: rankings without a better one after which training ends; 0: never.
    exact: the whole catalogue is ranked; otherwise the candidates of a search with that many beams.
    sasrec_baseline: train a SASRec as well, and report it. item_columns: of the corpus ("categories", "text"), by which
    recommendations from the pipeline can be filtered. mixed_precision_type: "fp16" or "bf16", used if amp. push_to_hf:
    upload the pipeline to the Hub as hf_model_name.
    """
    if push_to_hf and not HUB_ID.fullmatch(hf_model_name):
        raise ValueError("train.push_to_hf needs train.hf_model_name, a Hub repository (owner/name).")
    settings = dict(locals())
    check_options(top_k, beams, sasrec_baseline, every_position)

    # Input
    accelerator = distributed.start(amp, mixed_precision_type)
    device, is_main = accelerator.device, accelerator.is_main_process
    data = dataset, dataset_folder, dataset_split, split, force_dataset_process
    corpus, splits = load_splits(*data, accelerator, as_cached=True)
    columns = corpus.columns(item_columns) if item_columns else {}
    titles = corpus.titles() if is_main else []  # at once: a cache that can't be read ends the run before it trains
    sources, options = features or (), (splits.train_lengths, force_dataset_process, False, splits.name)
    read = partial(item_features, corpus, sources, dataset_folder, *options)
    artifact = pretrained_rqvae_path.format(corpus=corpus.name), pretrained_rqvae_revision
    semantic_ids, features = load_or_make_ids(
        *artifact, corpus, read if sources else None, device, encode_catalogue, text_model
    )
    tokenizer = Tokenizer.found(*artifact, text_model)
    check_splits(splits, semantic_ids, corpus.name)
    samples = windows(splits.train_lengths, max_items) if every_position else every_prefix(splits.train_lengths)
    source = SequenceSource(splits.interactions, samples, max_items, device, every_position)
    valid, test = source.with_samples(splits.valid), source.with_samples(splits.test)
    shuffler = Shuffler(len(source), batch_size * gradient_accumulate_every, seed, samples.user)

    # Model and optimizer
    set_seed(seed)
    tree = Tree.build(semantic_ids.codes, semantic_ids.level_sizes).to(device)
    described = torch.from_numpy(features).to(device) if features is not None else None  # [N, D]
    trained_on = in_training(splits.interactions, splits.train_lengths)
    counts = torch.bincount(splits.interactions.items[trained_on], minlength=corpus.n_items)
    model = EncoderDecoderRetrievalModel(tree, described, counts).train()
    recorded = has_kernel(device)  # passes are replayed as CUDA graphs
    evaluation = Evaluation(model, beams, exact, eval_batch_size, accelerator, recorded)
    flats = flat_parameters(model)
    optimizer = ShardedAdamW(flats, learning_rate, (weight_decay, 0.0), betas=(0.9, 0.98))
    inputs = {"corpus": corpus.hash, "split": splits.name, "semantic_ids": semantic_ids.digest}
    inputs["item_features"] = semantic_ids.tokenizer.get("item_features", "none")
    run = Run(save_dir_root.format(corpus=corpus.name), settings, inputs, accelerator)
    state = run.restore(model, optimizer)
    start_step, best = state["step"], state["best"]  # best: validation metrics of the best checkpoint
    distributed.weights_from_main(model)
    run.save_config()
    padding = padding_rows(batch_size // accelerator.num_processes) if recorded else 0
    spare = recorded and accelerator.num_processes > 1  # one more row: shares differ by one history's items at most
    replay = recorded_passes(model, source, flats, padding + spare, accelerator)

    # Loop
    lines = {
        "corpus": f"{corpus.name}: {corpus.n_users:,} users, {corpus.n_items:,} items, {splits.name} split",
        "semantic ids": f"{semantic_ids.level_sizes} codes on {tree.n_levels} levels",
        "training": f"{len(source):,} histories",
    }
    if is_main:
        report.heading("Retriever", lines, model, run.root, f"step {start_step:,} of {iterations:,}")
    protocol = "new" if exclude_history else "all"
    names = ["loss", "loss_items", *(f"loss_level_{n + 1}" for n in range(tree.n_levels))]
    last = last_step(iterations, best, patience * full_eval_every)
    with Steps(run, model, optimizer, shuffler, names, start_step) as steps:
        for step in range(start_step, iterations):
            if step >= last:  # validation no longer improves
                break
            steps.start(learning_rate * warmup_cosine(step, warmup_steps, iterations))
            seed_noise(derive_seed(seed, "dropout", step, accelerator.process_index), device)
            batch = shuffler.draw(step)
            lengths = source.lengths(*batch)
            targets = source.n_targets(lengths)
            step_losses = torch.zeros(len(names), device=device)  # this process's part
            for largest, own_lengths, *share in steps.even_shares(lengths, *batch):
                n_items = largest if recorded else int(own_lengths.sum())  # all record a new size in the same step
                size = bucket_size(n_items, padding, max_items)
                weight = torch.tensor(source.n_targets(own_lengths) / targets)  # the mean is over the step's targets
                step_losses += replay(size, *share, weight)
            norm = optimizer.update(max_gradient_norm, accelerator.scaler)

            steps.made(step + 1, step_losses, norm, replay.recording)
            if due(step + 1, partial_eval_every, iterations):
                run.log(step + 1, "valid", {"loss": evaluation.loss(valid)})
            improved = False
            if due(step + 1, full_eval_every, iterations):
                metrics, heads = evaluation.validate(valid, protocol, top_k)
                run.log(step + 1, "valid", metrics | heads)
                improved = metrics[CHOSEN] > best.get(CHOSEN, -1.0)
                best = {"step": step + 1, **metrics} if improved else best
                last = last_step(iterations, best, patience * full_eval_every)
            steps.end(step + 1, last, best, improved)

    # Test
    run.load_best(model)
    rows = baseline_ranks(test, splits.train_lengths, corpus.n_items)
    if sasrec_baseline:
        sasrec = train_sasrec(source, valid, corpus.n_items, protocol, accelerator, seed)
        rows["sasrec"] = sasrec_ranks(sasrec, test, accelerator)
    metrics = {f"valid/{name}": value for name, value in best.items()}
    metrics |= final_figures(evaluation, test, rows, splits.train_lengths, protocol, top_k)
    if is_main:
        save_ranks(run.root / "ranks.safetensors", rows)
        made = Pipeline(model, semantic_ids, features, titles, counts, max_items, tokenizer, columns)
        made.save(folder := run.root / "pipeline")
        made_of = corpus.name, corpus.item_keys, counts
        write_file(folder / CARD, pipeline_card(*made_of, splits.name, exclude_history, metrics).encode())
        shutil.copy(run.root / "config.gin", folder)
        save_held_out(run.root / HELD_OUT, corpus, splits.test)
    run.finish(metrics)
    if is_main:
        plots.retriever(run.root)
        report.retrieval_table(metrics, splits.name, exclude_history, run.root)
    if push_to_hf and is_main:
        print(f"Uploaded to {push_folder(run.root / 'pipeline', hf_model_name)}")
    distributed.end(accelerator)
    return metrics


def flat_parameters(model: EncoderDecoderRetrievalModel) -> tuple[FlatParameters, FlatParameters]:
    """The matrices, and the vectors and numbers, which weight decay leaves alone."""
    parameters = list(model.parameters())
    return FlatParameters(p for p in parameters if p.ndim >= 2), FlatParameters(p for p in parameters if p.ndim < 2)


def recorded_passes(
    model: EncoderDecoderRetrievalModel,
    source: SequenceSource,
    flats: tuple[FlatParameters, ...],
    padding: int,
    accelerator: Accelerator,
) -> Replay:
    """Forward and backward for samples, as `replay(size, index [B], uniform [B], weight [])`: they have `size` items
    with their `padding` rows (0: they are not recorded), and count `weight` in the step's mean. Returns their part of
    its losses: total, of the items, of each level."""

    def passes(size: int, index: torch.Tensor, uniform: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        with accelerator.autocast():  # here, so that a recording holds its own casts of the weights
            losses = model(source.batch(index, uniform, size, padding))
        accelerator.backward(losses.loss * weight)
        for flat in flats:
            flat.collect_grads()
        return torch.stack([losses.loss, losses.items, *losses.levels]).detach() * weight

    return Replay(passes, [flat.flat for flat in flats], accelerator.device, padding > 0)


def final_figures(
    evaluation: Evaluation,
    test: SequenceSource,
    rows: dict[str, dict[str, torch.Tensor]],
    train_lengths: torch.Tensor,
    protocol: str,
    top_k: tuple[int, ...],
) -> dict[str, float]:
    """What metrics.json says of the test split; adds the model's ranks to the rows of baselines."""
    n_items, own = evaluation.model.tree.n_items, evaluation.rows(test)
    rows |= own | evaluation.other_way(test)
    figures = all_figures(rows, task_groups(test, train_lengths, n_items), top_k, n_items)
    figures |= ranking_metrics(list(own.values())[-1][protocol], top_k)
    lists = evaluation.lists(test, min(CHOSEN_K, n_items), protocol == "new")
    figures["distinct_share"] = float(occurring(lists, n_items).float().mean())
    return {f"test/{name}": value for name, value in figures.items()}


def check_options(top_k: tuple[int, ...], beams: int, sasrec_baseline: bool, every_position: bool) -> None:
    """ValueError where they don't go together."""
    if CHOSEN_K not in top_k:
        raise ValueError(f"train.top_k = {top_k} lacks {CHOSEN_K}, by which checkpoints are chosen.")
    if sasrec_baseline and not every_position:
        raise ValueError("train.sasrec_baseline = True trains on every position: set train.every_position = True.")
    if beams < max(top_k):
        raise ValueError(f"train.beams = {beams} cannot rank the first {max(top_k)} items of train.top_k = {top_k}.")


def check_splits(splits: Splits, semantic_ids: SemanticIds, corpus_name: str) -> None:
    """ValueError where the tokenizer was made for others, or nothing is left to test on."""
    if (seen := semantic_ids.tokenizer.get("split", splits.name)) != splits.name:
        raise ValueError(
            f"The tokenizer was made for the {seen} split and may know what the {splits.name} split tests on: bind "
            "train.split and the shares of `temporal` as for train_rqvae.py."
        )
    if len(splits.test) == 0:
        raise ValueError(f"No user of corpus '{corpus_name}' has three or more interactions: nothing to evaluate.")


if __name__ == "__main__":
    cli.run(train, __doc__)
