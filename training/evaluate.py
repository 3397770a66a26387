"""Evaluation of a retriever over the full catalogue."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from data.baselines import MostPopular, Transition
from data.schemas import SeqBatch
from data.utils import SequenceSource, is_consumed, tokenize
from modules.generation.beam_search import beam_search
from modules.generation.trie import Trie
from modules.model import EncoderDecoderRetrievalModel
from ops.jagged import JaggedTensor
from training.metrics import RankingMetrics
from training.replay import Replay


class Evaluation:
    """Loss and ranking metrics of a retriever over whole splits.

    recorded: on a GPU, batches are filled up so that few shapes occur, and the passes over each shape are replayed as
    one CUDA graph. Recordings serve all splits, live as long as this object, and read the weights as they are then.
    """

    def __init__(
        self,
        model: EncoderDecoderRetrievalModel,
        trie: Trie,
        beams: int,
        batch_size: int,
        accelerator: Accelerator,
        recorded: bool,
    ) -> None:
        self.model, self.trie, self.beams, self.batch_size = model, trie, beams, batch_size
        self._accelerator, self._recorded = accelerator, recorded
        self._loss = Replay(self._batch_loss, [], accelerator.device, recorded)
        self._items = Replay(self._batch_items, [], accelerator.device, recorded)

    def loss(self, source: SequenceSource) -> float:
        """Mean of -log p(target) over all samples of the source, in nats."""
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self._accelerator.device)
        for batch in self.batches(source):
            history, targets, weights = batch.history, batch.targets.values, _weights(batch)
            total += self._loss(history.max_length, batch.user, history.values, history.offsets, targets, weights)
        self.model.train()
        loss, count = self._accelerator.reduce(total, "sum").tolist()
        return loss / count

    def metrics(self, source: SequenceSource, ks: tuple[int, ...]) -> dict[str, float]:
        """Recall@K and NDCG@K of the generated items over all samples of the source."""
        self.model.eval()
        metrics = RankingMetrics(ks, self._accelerator.device)
        for batch in self.batches(source):
            metrics.update(self.items(batch), batch.targets.values, _weights(batch) > 0)
        self.model.train()
        metrics.counts = self._accelerator.reduce(metrics.counts, "sum")
        return metrics.compute()

    def batches(self, source: SequenceSource) -> Iterator[SeqBatch]:
        """This process's batches of a source with one target a sample."""
        place = self._accelerator.process_index, self._accelerator.num_processes
        return source.in_order(self.batch_size, *place, self._recorded)

    def items(self, batch: SeqBatch) -> Tensor:
        """The items that `beam_search` finds, [B, K] int64; a recording's next call overwrites them."""
        consumed = (batch.consumed.values, batch.consumed.offsets) if batch.consumed is not None else ()
        history = batch.history
        return self._items(history.max_length, batch.user, history.values, history.offsets, *consumed)

    @torch.no_grad()
    def _batch_loss(
        self, longest: int, user: Tensor, items: Tensor, offsets: Tensor, targets: Tensor, weights: Tensor
    ) -> Tensor:
        """Sum of the losses of the users that count, and their number: [2] float64."""
        history = JaggedTensor(items, offsets, longest)
        batch = SeqBatch(user, history, JaggedTensor.uniform(targets[:, None]), target_weights=weights)
        with self._accelerator.autocast():  # here, so that a recording holds its own casts of the weights
            loss = self.model(tokenize(batch, self.trie.item_codes), self.trie).loss
        count = weights.sum(dtype=torch.float64)
        return torch.stack([loss.double() * count, count])

    @torch.no_grad()
    def _batch_items(self, longest: int, user: Tensor, items: Tensor, offsets: Tensor, *consumed: Tensor) -> Tensor:
        """See `items`. consumed: values and offsets, where items are left out."""
        left_out = JaggedTensor(*consumed, max_length=len(consumed[0])) if consumed else None
        none = JaggedTensor(user[:0], torch.zeros_like(offsets), 0)
        batch = SeqBatch(user, JaggedTensor(items, offsets, longest), none, left_out)
        with self._accelerator.autocast():
            return beam_search(self.model, tokenize(batch, self.trie.item_codes), self.trie, self.beams).items


def _weights(batch: SeqBatch) -> Tensor:
    """What each user's target counts: [B] float32."""
    weights = batch.target_weights
    return torch.ones(len(batch.user), device=batch.user.device) if weights is None else weights


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
