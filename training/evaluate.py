"""Evaluation of a retriever: the rank of every user's target, among all items and among those not yet consumed."""

from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor

from common.schemas import RankedItems, SeqBatch
from data.batches import SequenceData, SequenceSource, Sizes
from modules.embedding import Vectors
from modules.generation.beam_search import Candidates, beam_search, whole_catalogue
from modules.model import EncoderDecoderRetrievalModel
from modules.serving.recommender import MAX_EXACT
from ops.jagged import JaggedTensor
from training.metrics import CHOSEN, PROTOCOLS, exact_ranks, ranking_metrics
from training.replay import Replay

MAX_SCORES = 2**27  # of a batch, where beams are compared with the exact ranking
SHARES = (0.0, 0.15, 0.3, 0.5, 0.7, 0.85, 1.0)  # of the item head in the score, among which validation chooses
Planned = tuple[SequenceData, Sizes]  # what is the same for batches of equal shapes


class Evaluation:
    """Loss and ranks of a retriever over whole splits.

    exact: scores the whole catalogue; otherwise `beams` candidates are generated and ranked by both heads. ValueError
    where the model can't do that.
    recorded: on a GPU, batches are filled up so that few shapes occur, and the passes over each shape are replayed as
    one CUDA graph. Recordings serve all splits, live as long as this object, and read the weights as they are then.
    """

    def __init__(
        self,
        model: EncoderDecoderRetrievalModel,
        beams: int,
        exact: bool,
        batch_size: int,
        accelerator: Accelerator,
        recorded: bool,
    ) -> None:
        if exact and model.decoder is not None:
            raise ValueError("train.exact = True ranks models with decoder_layers = 0: set train.exact = False.")
        if not exact and "tree" not in model.heads:
            raise ValueError("train.exact = False searches the tree, which a model with tree_loss = 0 has no head for.")
        self.model, self.beams, self.exact, self.batch_size = model, beams, exact, batch_size
        self.shares = SHARES if len(model.heads) == 2 else SHARES[:1] if "tree" in model.heads else SHARES[-1:]
        self._accelerator, self._vectors = accelerator, Vectors(None, [], [])  # none yet
        self._loss = Replay(self._batch_loss, [], accelerator.device, recorded)
        self._ranks = Replay(self._exact_ranks if exact else self._beam_ranks, [], accelerator.device, recorded)
        self._recorded = recorded

    def loss(self, source: SequenceSource) -> float:
        """Mean of the training loss, without dropout, over all samples of the source."""
        self._prepare()
        total = torch.zeros(2, dtype=torch.float64, device=self._accelerator.device)
        for _, (sizes, *plan) in self._plans(source):
            total += self._loss((source.data, sizes), *plan)
        self.model.train()
        loss, count = self._accelerator.reduce(total, "sum").tolist()
        return loss / count

    def ranks(self, source: SequenceSource) -> Tensor:
        """Of each sample's target, from 0, for each of `shares` and of `PROTOCOLS`: [shares, 2, S] int64, on the CPU;
        N where it is not among the candidates, or consumed and thus no candidate."""
        return self._of_samples(source, (len(self.shares), 2), self._ranks)

    def _of_samples(self, source: SequenceSource, shape: tuple[int, ...], found: Callable[..., Tensor]) -> Tensor:
        """What `found` says of the samples of each batch, [*shape, B] int64: [*shape, S], on the CPU. Its arguments are
        those of `SequenceData.planned`, whose data and sizes come as one."""
        self._prepare()
        result = torch.zeros(*shape, len(source), dtype=torch.int64, device=self._accelerator.device)
        for start, (sizes, *plan) in self._plans(source):
            count = min(self.batch_size, len(source) - start)
            result[..., start : start + count] = found((source.data, sizes), *plan)[..., :count]
        self.model.train()
        return self._accelerator.reduce(result, "sum").cpu()

    def rows(self, source: SequenceSource) -> dict[str, dict[str, Tensor]]:
        """Ranks by each head and by both, as the model weighs them: {"tree": {"all": [S] int64, "new": ..}, ..}; what
        the model recommends by comes last."""
        shares = {"tree": 0.0, "items": 1.0, "fused": round(float(self.model.item_share), 4)}
        shares = shares if len(self.model.heads) == 2 else {name: shares[name] for name in self.model.heads}
        ranks = self.ranks(source)
        return {
            name: dict(zip(PROTOCOLS, ranks[self.shares.index(share)], strict=True)) for name, share in shares.items()
        }

    def other_way(self, source: SequenceSource) -> dict[str, dict[str, Tensor]]:
        """The last of `rows` found by beams, if that is exact, or else exactly; {} where it can't be."""
        n_items = self.model.tree.n_items
        if "tree" not in self.model.heads or self.model.decoder is not None or n_items > MAX_EXACT:
            return {}
        size = max(1, min(self.batch_size, MAX_SCORES // n_items))
        other = Evaluation(self.model, self.beams, not self.exact, size, self._accelerator, self._recorded)
        return {"beams" if self.exact else "exact": list(other.rows(source).values())[-1]}

    def validate(
        self, source: SequenceSource, protocol: str, ks: tuple[int, ...]
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Gives the model the item head's share that ranks best; metrics with it, and CHOSEN of each head alone."""
        ranks = self.ranks(source)[:, list(PROTOCOLS).index(protocol)]
        by_share = [ranking_metrics(own, ks) for own in ranks]
        n = max(range(len(by_share)), key=lambda n: by_share[n][CHOSEN])
        self.model.item_share.fill_(self.shares[n])
        heads = {f"{head}/{CHOSEN}": by_share[-i][CHOSEN] for i, head in enumerate(self.model.heads)}
        return {"item_share": self.shares[n], **by_share[n]}, heads

    def lists(self, source: SequenceSource, k: int, new: bool) -> Tensor:
        """The k best items of each sample by both heads: [S, k] int64, on the CPU, -1 where there are fewer."""

        def found(planned: Planned, samples: Tensor, n_real: Tensor) -> Tensor:
            batch = self._batch(planned, samples.to(source.device), n_real.to(source.device))
            return self.best(batch, k, new).items.T

        return self._of_samples(source, (k,), found).T

    @torch.no_grad()
    def best(self, batch: SeqBatch, k: int, new: bool) -> RankedItems:
        """The k best items of each user; new: of those not consumed."""
        consumed = batch.consumed, new
        with self._accelerator.autocast():
            inputs = self.model, self.model.encode(batch.history, self._vectors), self._vectors
            found = whole_catalogue(*inputs, *consumed) if self.exact else beam_search(*inputs, self.beams, *consumed)
            return found.best(self.model.item_share, k)

    def _prepare(self) -> None:
        """Puts the vectors of items and nodes as they are now where recordings read them."""
        self.model.eval()
        with torch.no_grad(), self._accelerator.autocast():
            if self._vectors.items is None and not self._vectors.nodes:
                self._vectors = self.model.vectors()
            else:
                self.model.remake(self._vectors)

    def _plans(self, source: SequenceSource) -> Iterator[tuple[int, tuple[Sizes, Tensor, Tensor]]]:
        """The first sample of each of this process's batches of a source with one target a sample, and its plan."""
        place, n = self._accelerator.process_index, self._accelerator.num_processes
        plans = source.plans(self.batch_size, place, n, self._recorded)
        return ((self.batch_size * (place + n * i), plan) for i, plan in enumerate(plans))

    @staticmethod
    def _batch(planned: Planned, samples: Tensor, n_real: Tensor) -> SeqBatch:
        data, sizes = planned
        return data.planned(sizes, samples, n_real)

    @torch.no_grad()
    def _batch_loss(self, planned: Planned, samples: Tensor, n_real: Tensor) -> Tensor:
        """Sum of the losses of the users that count, and their number: [2] float64."""
        batch = self._batch(planned, samples, n_real)
        with self._accelerator.autocast():  # here, so that a recording holds its own casts of the weights
            loss = self.model(batch).loss
        count = batch.weights.sum(dtype=torch.float64)
        return torch.stack([loss.double() * count, count])

    @torch.no_grad()
    def _exact_ranks(self, planned: Planned, samples: Tensor, n_real: Tensor) -> Tensor:
        """See `ranks`."""
        batch = self._batch(planned, samples, n_real)
        left_out, targets = consumed(batch), batch.targets.values
        with self._accelerator.autocast():
            encoded = self.model.encode(batch.history, self._vectors)
            found = whole_catalogue(self.model, encoded, self._vectors, left_out)
        ranks = [torch.stack(exact_ranks(found.scores(share), targets, left_out)) for share in self.shares]
        return torch.stack(ranks)

    @torch.no_grad()
    def _beam_ranks(self, planned: Planned, samples: Tensor, n_real: Tensor) -> Tensor:
        """See `ranks`."""
        batch = self._batch(planned, samples, n_real)
        left_out, targets, missing, ranks = consumed(batch), batch.targets.values, self.model.tree.n_items, []
        with self._accelerator.autocast():
            encoded = self.model.encode(batch.history, self._vectors)
        for new in (False, True):
            with self._accelerator.autocast():
                found = beam_search(self.model, encoded, self._vectors, self.beams, left_out, new)
            ranks.append(torch.stack([candidate_ranks(found, share, targets, missing) for share in self.shares]))
        return torch.stack(ranks, 1)


def candidate_ranks(found: Candidates, share: float, targets: Tensor, missing: int) -> Tensor:
    """Rank of each user's target among the candidates, after those of equal score; `missing` where it is none. Shape:
    targets [B] -> [B] int64."""
    scores, hit = found.scores(share), found.items == targets[:, None]
    own = scores.masked_fill(~hit, float("-inf")).amax(1, keepdim=True)
    return torch.where(hit.any(1), (scores >= own).sum(1) - 1, missing)


def consumed(batch: SeqBatch) -> JaggedTensor:
    assert batch.consumed is not None  # outside training a batch knows what was consumed
    return batch.consumed
