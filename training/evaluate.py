"""Evaluation of a retriever over the full catalogue."""

import torch
from accelerate import Accelerator
from torch import Tensor

from data.baselines import MostPopular, Transition
from data.utils import SequenceSource, is_consumed, tokenize
from modules.generation.beam_search import beam_search
from modules.generation.trie import Trie
from modules.model import EncoderDecoderRetrievalModel
from training.metrics import RankingMetrics


@torch.no_grad()
def validation_loss(
    model: EncoderDecoderRetrievalModel, source: SequenceSource, trie: Trie, batch_size: int, accelerator: Accelerator
) -> float:
    """Mean of -log p(target) over all samples of the source, in nats."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in source.in_order(batch_size, accelerator.process_index, accelerator.num_processes):
        loss = model(tokenize(batch, trie.item_codes), trie).loss
        n = batch.user.shape[0]
        total += torch.stack([loss.double() * n, torch.full_like(total[0], n)])
    model.train()
    loss, count = accelerator.reduce(total, "sum").tolist()
    return loss / count


def retrieval_metrics(
    model: EncoderDecoderRetrievalModel,
    source: SequenceSource,
    trie: Trie,
    ks: tuple[int, ...],
    beams: int,
    batch_size: int,
    accelerator: Accelerator,
) -> dict[str, float]:
    """Recall@K and NDCG@K of the generated items over all samples of the source."""
    model.eval()
    metrics = RankingMetrics(ks, accelerator.device)
    for batch in source.in_order(batch_size, accelerator.process_index, accelerator.num_processes):
        with accelerator.autocast():
            ranked = beam_search(model, tokenize(batch, trie.item_codes), trie, beams)
        metrics.update(ranked.items, batch.targets.values)
    model.train()
    metrics.counts = accelerator.reduce(metrics.counts, "sum")
    return metrics.compute()


def baseline_metrics(
    source: SequenceSource, train_lengths: Tensor, n_items: int, ks: tuple[int, ...]
) -> dict[str, float]:
    """The same metrics of the two trivial baselines: {"most_popular/recall@5": .., "transition/ndcg@10": ..}."""
    result = {}
    for name, baseline in (("most_popular", MostPopular), ("transition", Transition)):
        ranker, metrics = baseline(source.interactions, train_lengths, n_items), RankingMetrics(ks)
        for batch in source.in_order(256):
            last = batch.history.values[batch.history.offsets[1:] - 1].cpu()
            spare = batch.consumed.max_length if batch.consumed is not None else 0
            items = ranker.rank(last, min(max(ks) + spare, n_items))
            if batch.consumed is not None:
                seen = is_consumed(items, batch.consumed.to("cpu"))
                order = seen.sort(dim=1, stable=True).indices  # those not consumed first
                items = items.masked_fill(seen, -1).gather(1, order)
            metrics.update(items, batch.targets.values.cpu())
        result |= {f"{name}/{key}": value for key, value in metrics.compute().items()}
    return result
