"""Ranks of what a retriever is compared with: two trivial baselines, and SASRec, which is trained here."""

from typing import Literal

import torch
from accelerate import Accelerator
from pydantic import InstanceOf
from torch import Tensor

from common.parameters import NonNegativeInt, PositiveInt, Rate, Seed, configurable
from common.schemas import SeqBatch
from data.baselines import MostPopular, Transition
from data.batches import SequenceSource, bucket_size, padding_rows
from data.shuffle import Shuffler, derive_seed, seed_noise
from modules.sasrec import SasRec
from ops.dispatch import has_kernel
from training import report
from training.flat import FlatParameters
from training.metrics import CHOSEN, CHOSEN_K, PROTOCOLS, exact_ranks, ranking_metrics, ranks_among_new
from training.replay import Replay
from training.schedule import due, warmup_cosine


def baseline_ranks(source: SequenceSource, train_lengths: Tensor, n_items: int) -> dict[str, dict[str, Tensor]]:
    """Exact ranks of the targets: {"most_popular": {"all": [S] int64, "new": [S] int64}, "transition": ..}. source: one
    target a sample. train_lengths: [U] int64, how many leading interactions of each user are training data."""
    result = {}
    for name, kind in (("most_popular", MostPopular), ("transition", Transition)):
        baseline = kind(source.interactions, train_lengths, n_items)
        result[name] = _joined([_batch_ranks(baseline, batch, n_items) for batch in source.in_order(1024)])
    return result


def _batch_ranks(baseline: MostPopular | Transition, batch: SeqBatch, n_items: int) -> tuple[Tensor, Tensor]:
    """Ranks under "all" and "new", 2 x [B] int64 on the CPU."""
    assert batch.consumed is not None
    history, targets = batch.history, batch.targets.values.cpu()
    last = history.values[history.offsets[1:] - 1].cpu()
    ranks = baseline.places(last, targets)

    def ahead(rows: Tensor, items: Tensor) -> Tensor:
        return baseline.places(last[rows], items) < ranks[rows]

    return ranks, ranks_among_new(ranks, targets, batch.consumed.to("cpu"), n_items, ahead)


@torch.no_grad()
def sasrec_ranks(model: SasRec, source: SequenceSource, accelerator: Accelerator) -> dict[str, Tensor]:
    """Exact ranks of the targets: {"all": [S] int64, "new": [S] int64}, on the CPU. source: one target a sample. Scores
    are float32, since equal ones count against the target."""
    model.eval()
    parts = []
    for batch in source.in_order(512):
        with accelerator.autocast():
            states = model.state(batch.history)
        assert batch.consumed is not None
        parts.append(exact_ranks(states.float() @ model.vectors.T, batch.targets.values, batch.consumed))
    model.train()
    return _joined(parts)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Joins what batches have under "all" and "new"."""
    return {name: torch.cat(ranks).cpu() for name, ranks in zip(PROTOCOLS, zip(*parts, strict=True), strict=True)}


@configurable
def train_sasrec(
    source: InstanceOf[SequenceSource],
    valid: InstanceOf[SequenceSource],
    n_items: PositiveInt,
    protocol: Literal["all", "new"],
    accelerator: InstanceOf[Accelerator],
    seed: Seed,
    iterations: PositiveInt = 4000,
    batch_size: PositiveInt = 256,
    learning_rate: Rate = 1e-3,
    warmup_steps: NonNegativeInt = 100,
    eval_every: PositiveInt = 250,
    patience: PositiveInt = 16,
) -> SasRec:
    """Trains a SASRec and returns it with the weights of the best validation ndcg@10.

    source: training windows with a target at every position. valid: one target a sample, ranked under `protocol`, "all"
    or "new". patience: validations without a new best after which training ends. The processes of a launch all
    do the same, without waiting for each other.
    """
    device, recorded = accelerator.device, has_kernel(accelerator.device)
    torch.manual_seed(derive_seed(seed, "sasrec"))
    model = SasRec(n_items, source.max_items).to(device)
    parameters = FlatParameters(model.parameters())
    optimizer = torch.optim.AdamW([parameters.flat], learning_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=accelerator.scaler is not None)
    shuffler = Shuffler(len(source), batch_size, seed, source.samples.user)
    padding = padding_rows(shuffler.batch_size) if recorded else 0

    def passes(size: int, index: Tensor, uniform: Tensor) -> Tensor:
        with accelerator.autocast():  # here, so that a recording holds its own casts of the weights
            loss = model(source.batch(index, uniform, size, padding))
        scaler.scale(loss).backward()
        parameters.collect_grads()
        return loss.detach()

    replay = Replay(passes, [parameters.flat], device, recorded)
    weights, best, best_step = parameters.flat.detach().clone(), -1.0, 0
    bar = report.progress(iterations, 0, accelerator.is_main_process)
    for step in range(iterations):
        seed_noise(derive_seed(seed, "sasrec dropout", step), device)
        optimizer.param_groups[0]["lr"] = learning_rate * warmup_cosine(step, warmup_steps, iterations)
        index, uniform = shuffler.draw(step)
        replay(bucket_size(source.n_items(index, uniform), padding, source.max_items), index, uniform)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        bar.update()
        if due(step + 1, eval_every, iterations):
            ndcg = ranking_metrics(sasrec_ranks(model, valid, accelerator)[protocol], (CHOSEN_K,))[CHOSEN]
            if ndcg > best:
                weights, best, best_step = parameters.flat.detach().clone(), ndcg, step
            if step - best_step >= patience * eval_every:
                break
    bar.close()
    parameters.flat.detach().copy_(weights)
    return model
