"""Stage 2: trains a transformer that generates a user's next item down the tree of semantic IDs; Recall, NDCG and MRR.

    python train_decoder.py configs/decoder_sample.gin

Needs the tokenizer of the same corpus, from train_rqvae.py. The best checkpoint by validation NDCG is tested once.
"""

import shutil
from collections.abc import Sequence
from functools import partial
from typing import Literal

import gin
import torch
from accelerate.utils import set_seed
from pydantic import NonNegativeInt, PositiveInt, SkipValidation

from data.cooccurrence import CoOccurrenceSvd  # noqa: F401  (named in configs)
from data.encoders import SentenceEncoder, TfidfSvd  # noqa: F401  (named in configs)
from data.features import FeatureSource, item_features
from data.files import write_file
from data.parameters import Rate, checked
from data.processed import RecDataset, load_corpus
from data.splits import draw_splits, every_prefix, in_training, windows
from data.utils import SequenceSource, Shuffler, derive_seed, filled_size, filler_rows, seed_noise
from data.vectors import Vectors  # noqa: F401  (named in configs)
from modules.card import pipeline_card
from modules.inspection import HELD_OUT, save_held_out
from modules.model import EncoderDecoderRetrievalModel
from modules.pipeline import Pipeline
from modules.pretrained import CARD, HUB_ID, push_folder
from modules.tokenizer.catalogue import Described, load_or_make_ids
from modules.tokenizer.tokenizer import Tokenizer
from modules.tree import Tree
from ops.jagged import runs_kernels
from training import cli, distributed, plots, report
from training.baselines import baseline_ranks, sasrec_ranks, train_sasrec
from training.evaluate import PROTOCOLS, Evaluation
from training.flat import FlatParameters
from training.health import Health
from training.metrics import all_figures, occurring, ranking_metrics, save_ranks, task_groups
from training.replay import Replay
from training.run import Run
from training.schedule import due, warmup_cosine
from training.signals import Stopped, StopSignal

MAX_EXACT = 500_000  # items up to which beams are compared with the exact ranking
MAX_SCORES = 2**27  # of a batch in that comparison
CHOSEN_K = 10  # checkpoints and the item head's share are chosen by validation ndcg@10


@gin.configurable
@checked("train")
def train(
    dataset: RecDataset = gin.REQUIRED,
    dataset_folder: str = "dataset",
    dataset_split: str = "",
    split: str = "leave-one-out",
    pretrained_rqvae_path: str = "./out/rqvae_{corpus}",
    pretrained_rqvae_revision: str | None = None,
    features: Sequence[SkipValidation[FeatureSource]] | None = None,
    encode_catalogue: bool = False,
    text_model: str | None = None,
    save_dir_root: str = "out/decoder_{corpus}",
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
    item_columns: tuple[str, ...] = (),
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
    wandb_project: str = "generative-retrieval",
    force_dataset_process: bool = False,
    seed: int = 0,
) -> dict[str, float]:
    """Trains the retriever of one corpus and returns what metrics.json holds.

    dataset, dataset_folder, dataset_split: see `data.processed.load_corpus`. split: "leave-one-out" or "temporal",
    the tokenizer's. pretrained_rqvae_path: run or tokenizer folder, file of semantic IDs or index.json, or Hub id (at
    pretrained_rqvae_revision); in it and in save_dir_root "{corpus}" stands for the corpus name. encode_catalogue: the
    tokenizer gives this catalogue its IDs, by its own feature sources; text_model: where its sentence encoder lies now.
    features: only for a tokenizer without sources of its own (of the original project), or beside an index.json.
    batch_size: histories a micro-step over all processes. max_items: longest history. every_position: each
    item of a training window is a target given those before it; off: one target a history, as a
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
    if CHOSEN_K not in top_k:
        raise ValueError(f"train.top_k = {top_k} lacks {CHOSEN_K}, by which checkpoints are chosen.")
    if sasrec_baseline and not every_position:
        raise ValueError("train.sasrec_baseline = True trains on every position: set train.every_position = True.")
    if beams < max(top_k):
        raise ValueError(f"train.beams = {beams} cannot rank the first {max(top_k)} items of train.top_k = {top_k}.")
    accelerator = distributed.start(amp, mixed_precision_type, gradient_accumulate_every)
    device = accelerator.device
    with distributed.in_turn(accelerator):
        force = force_dataset_process and accelerator.is_local_main_process
        corpus = load_corpus(dataset, dataset_folder, dataset_split, force)
    columns = corpus.columns(item_columns) if item_columns else {}
    splits = draw_splits(split, corpus.interactions)
    corpus.interactions = splits.interactions  # ties may have been shuffled
    read = partial(read_features, corpus, features, dataset_folder, splits, force_dataset_process) if features else None
    path = pretrained_rqvae_path.format(corpus=corpus.name)
    semantic_ids, features = load_or_make_ids(
        path, pretrained_rqvae_revision, corpus, read, device, encode_catalogue, text_model
    )
    tokenizer = Tokenizer.found(path, pretrained_rqvae_revision, text_model)
    if (seen := semantic_ids.tokenizer.get("split", splits.name)) != splits.name:
        raise ValueError(
            f"The tokenizer was made for the {seen} split and may know what the {splits.name} split tests on: bind "
            "train.split and the shares of `temporal` as for train_rqvae.py."
        )
    item_features = semantic_ids.tokenizer.get("item_features", "none")
    tree = Tree.build(semantic_ids.codes, semantic_ids.level_sizes).to(device)
    if len(splits.test) == 0:
        raise ValueError(f"No user of corpus '{corpus.name}' has three or more interactions: nothing to evaluate.")
    samples = windows(splits.train_lengths, max_items) if every_position else every_prefix(splits.train_lengths)
    source = SequenceSource(splits.interactions, samples, max_items, device, every_position)
    valid = SequenceSource(splits.interactions, splits.valid, max_items, device)
    test = SequenceSource(splits.interactions, splits.test, max_items, device)

    set_seed(seed)
    described = torch.from_numpy(features).to(device) if features is not None else None  # [N, D]
    trained_on = in_training(splits.interactions, splits.train_lengths)
    counts = torch.bincount(splits.interactions.items[trained_on], minlength=corpus.n_items)
    model = EncoderDecoderRetrievalModel(tree, described, counts)
    if exact and model.decoder is not None:
        raise ValueError("train.exact = True ranks models with decoder_layers = 0: set train.exact = False.")
    if not exact and "tree" not in model.heads:
        raise ValueError("train.exact = False searches the tree, which a model with tree_loss = 0 has no head for.")
    matrices = FlatParameters(p for p in model.parameters() if p.ndim >= 2)
    vectors = FlatParameters(p for p in model.parameters() if p.ndim < 2)
    parameters = [matrices.whole, vectors.whole]
    groups = [{"params": matrices.whole}, {"params": vectors.whole, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, learning_rate, betas=(0.9, 0.98), weight_decay=weight_decay, fused=True)
    run = Run(
        save_dir_root.format(corpus=corpus.name),
        settings,
        {
            "corpus": corpus.hash,
            "split": splits.name,
            "semantic_ids": semantic_ids.digest,
            "item_features": item_features,
        },
        accelerator,
    )
    state = run.restore(model, optimizer)
    distributed.weights_from_main(model)
    first, best = state["step"], state["best"]  # best: validation metrics of the best checkpoint
    run.save_config()
    optimizer = accelerator.prepare(optimizer)

    recorded = runs_kernels(device)  # passes are replayed as CUDA graphs
    fillers = filler_rows(batch_size // accelerator.num_processes) if recorded else 0

    def passes(size: int, index: torch.Tensor, uniform: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Forward and backward for samples that count `weight` in the step's mean; returns their part of its losses."""
        with accelerator.autocast():  # here, so that a recording holds its own casts of the weights
            losses = model(source.device_batch(index, uniform, size, fillers))
        accelerator.backward(losses.loss * weight * gradient_accumulate_every)
        matrices.gather()
        vectors.gather()
        return torch.stack([losses.loss, losses.items, *losses.levels]).detach() * weight

    replay = Replay(passes, parameters, device, recorded)
    evaluation = Evaluation(model, beams, exact, eval_batch_size, accelerator, recorded)

    report.heading(
        "Retriever",
        corpus=f"{corpus.name}: {corpus.n_users:,} users, {corpus.n_items:,} items, {splits.name} split",
        semantic_ids=f"{semantic_ids.level_sizes} codes on {tree.n_levels} levels",
        training=f"{len(source):,} histories",
        model=f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}",
        folder=run.root,
        start=f"step {first:,} of {iterations:,}",
        show=accelerator.is_main_process,
    )
    protocol = PROTOCOLS.index("new" if exclude_history else "all")
    chosen_by = f"ndcg@{CHOSEN_K}"
    shuffler = Shuffler(len(source), batch_size * gradient_accumulate_every, seed, samples.user)
    n_shares = accelerator.num_processes * gradient_accumulate_every
    shuffler.check_shares(n_shares)
    health = Health(accelerator, shuffler, run.checkpoints)
    names = ["loss", "loss_items", *(f"loss_level_{n + 1}" for n in range(tree.n_levels))]
    bar, speed = report.progress(iterations, first, accelerator.is_main_process), report.Speed()
    model.train()
    with StopSignal(accelerator.num_processes) as stop:
        for step in range(first, iterations):
            speed.start()
            seed_noise(derive_seed(seed, "dropout", step, accelerator.process_index), device)
            factor = warmup_cosine(step, warmup_steps, iterations)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * factor
            index, uniform = shuffler.draw(step)
            shares = list(zip(index.tensor_split(n_shares), uniform.tensor_split(n_shares), strict=True))
            targets = source.n_targets(index, uniform)
            means = torch.zeros(len(names), device=device)  # this process's part of the step's losses
            for share in shares[accelerator.process_index :: accelerator.num_processes]:
                with accelerator.accumulate():
                    n_items = source.n_items(*share)
                    size = filled_size(n_items, fillers, max_items)
                    weight = torch.tensor(source.n_targets(*share) / targets)  # the mean is over the step's targets
                    means += replay(size, *share, weight)
                    if accelerator.sync_gradients:
                        distributed.sum_gradients(parameters, accelerator)
                        norm = accelerator.clip_grad_norm_(parameters, max_gradient_norm)
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
            done = step + 1
            health.watch(done, means[0], norm)
            bar.update()

            if due(done, log_every, iterations):
                values = dict(zip(names, accelerator.reduce(means, "sum").tolist(), strict=True))
                values |= {"gradient_norm": float(norm), "learning_rate": learning_rate * factor}
                values |= report.machine(speed.steps_per_second(replay.recording) * shuffler.batch_size, accelerator)
                run.log(done, "train", values)
                report.show(bar, values)
                health.check(model)
            speed.stop()
            if due(done, partial_eval_every, iterations):
                run.log(done, "valid", {"loss": evaluation.loss(valid)})
            improved = False
            if due(done, full_eval_every, iterations):
                by_share = [ranking_metrics(ranks[protocol], top_k) for ranks in evaluation.ranks(valid)]
                n = max(range(len(by_share)), key=lambda n: by_share[n][chosen_by])
                model.item_share.fill_(evaluation.shares[n])
                metrics = {"step": done, "item_share": evaluation.shares[n], **by_share[n]}
                heads = {f"{head}/{chosen_by}": by_share[-i][chosen_by] for i, head in enumerate(model.heads)}
                run.log(done, "valid", metrics | heads)
                improved = metrics[chosen_by] > best.get(chosen_by, -1.0)
                best = metrics if improved else best
            signum = stop.after_step()
            if signum or improved or due(done, save_model_every, iterations):
                health.check(model)
                run.save(done, model, optimizer, best, improved)
            if signum:
                bar.close()
                run.close(status=128 + signum)
                distributed.end(accelerator)
                raise Stopped(signum, done)
            if patience and best and done - best["step"] >= patience * full_eval_every:
                break
    bar.close()

    run.load_best(model)
    rows = baseline_ranks(test, splits.train_lengths, corpus.n_items)
    if sasrec_baseline:
        sasrec = train_sasrec(source, valid, corpus.n_items, PROTOCOLS[protocol], accelerator, seed)
        rows["sasrec"] = sasrec_ranks(sasrec, test, accelerator)
    rows |= evaluation.rows(test)
    chosen = list(rows)[-1]
    if "tree" in model.heads and model.decoder is None and corpus.n_items <= MAX_EXACT:  # what the beams lose
        size = max(1, min(eval_batch_size, MAX_SCORES // corpus.n_items))
        other = Evaluation(model, beams, not exact, size, accelerator, recorded)
        rows["beams" if exact else "exact"] = other.rows(test)[chosen]
    figures = all_figures(rows, task_groups(test, splits.train_lengths, corpus.n_items), top_k, corpus.n_items)
    figures |= ranking_metrics(rows[chosen][PROTOCOLS[protocol]], top_k)
    lists = evaluation.lists(test, min(CHOSEN_K, corpus.n_items), exclude_history)
    figures["distinct_share"] = float(occurring(lists, corpus.n_items).float().mean())
    metrics = {f"valid/{name}": value for name, value in best.items()}
    metrics |= {f"test/{name}": value for name, value in figures.items()}
    if accelerator.is_main_process:
        save_ranks(run.root / "ranks.safetensors", rows)
        model.save_pretrained(run.root / "model")
        made = Pipeline(model, semantic_ids, features, corpus.titles(), counts, max_items, tokenizer, columns)
        made.save(folder := run.root / "pipeline")
        write_file(folder / CARD, pipeline_card(made, splits.name, exclude_history, metrics).encode())
        shutil.copy(run.root / "config.gin", folder)
        save_held_out(run.root / HELD_OUT, corpus, splits.test)
    run.finish(metrics)
    if accelerator.is_main_process:
        plots.retriever(run.root)
    report.retrieval_table(metrics, splits.name, exclude_history, run.root, show=accelerator.is_main_process)
    if push_to_hf and accelerator.is_main_process:
        print(f"Uploaded to {push_folder(run.root / 'pipeline', hf_model_name)}")
    distributed.end(accelerator)
    return metrics


def read_features(corpus, features, dataset_folder, splits, force) -> Described:
    """What a tokenizer without IDs for the corpus reads of it."""
    described = item_features(corpus, features, dataset_folder, splits.train_lengths, force)
    return Described(described, splits.name)


if __name__ == "__main__":
    cli.run(train, __doc__)
