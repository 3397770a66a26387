"""From histories of item keys to ranked items of a catalogue."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from common.schemas import RankedItems
from modules.generation.beam_search import Candidates, LeftOut, beam_search, head_normalizer, whole_catalogue
from modules.serving.filters import Filters, Given, chosen
from modules.serving.lookup import Keys, Lookup
from modules.serving.pipeline import Pipeline
from ops.jagged import JaggedTensor

if TYPE_CHECKING:
    import polars as pl

MAX_EXACT = 500_000  # items up to which the whole catalogue is ranked
MAX_LOGITS = {"cpu": 2**24, "cuda": 2**27}  # of users, for items or children, that exist at once
BEAMS = 50


@dataclass(frozen=True)
class Ranked:
    """K items of each of B users, best first, on the CPU. items: [B, K] int64, -1 where fewer are left; scores: [B, K]
    float32, log-probabilities, -inf there. known, unknown: [B] int64, how many items of the history the catalogue has,
    and how many not."""

    items: Tensor
    scores: Tensor
    known: np.ndarray
    unknown: np.ndarray

    @property
    def popular(self) -> np.ndarray:
        """[B] bool, whether no item of the history is known and the most popular ones come."""
        return self.known == 0


@dataclass(frozen=True)
class Recommendation:
    """One item; score: its log-probability."""

    key: str
    title: str
    score: float
    semantic_id: tuple[int, ...]


@dataclass(frozen=True)
class Recommendations:
    """Of one history, best first. popular, unknown: see `Ranked`."""

    items: list[Recommendation]
    popular: bool
    unknown: int


class Recommender:
    """Ranks the items of a catalogue for histories of item keys. keys, titles: [N]; codes: [N, L'] int64, the semantic
    IDs; index: {key: item}. Nothing is kept between calls."""

    def __init__(self, pipeline: Pipeline) -> None:
        """It computes where the pipeline's model lies."""
        self.model, self.max_items = pipeline.model, pipeline.max_items
        self.device = self.model.tree.leaf_items.device
        self.keys, self.titles = pipeline.semantic_ids.item_keys, pipeline.titles
        self.codes = pipeline.semantic_ids.codes
        self._lookup = Lookup(self.keys, self.titles, pipeline.columns)
        self.index = self._lookup.index
        with torch.no_grad():
            self._vectors = self.model.vectors()
        self._cold = (pipeline.counts == 0).to(self.device)  # [N]
        smoothed = pipeline.counts.double() + 1
        self._popularity = (smoothed / smoothed.sum()).log().float().to(self.device)  # [N]
        small = len(self.keys) <= MAX_EXACT or "tree" not in self.model.heads
        self._exact = self.model.decoder is None and small

    @staticmethod
    def from_pretrained(
        path: str | Path, revision: str | None = None, device: torch.device | str = "cpu"
    ) -> "Recommender":
        """path: a run of train_decoder.py, its pipeline folder, or a Hub id (`owner/name`) at `revision`.
        FileNotFoundError or ValueError names what is missing, damaged or of another format; see `resolve`, too."""
        return Recommender(Pipeline.load(path, revision, device))

    def recommend(self, histories: Sequence[Keys], k: int = 10, **options) -> list[Recommendations]:
        """The k best items for each history of item keys, oldest first, or all that are left. options: of `rank`."""
        ranked, result = self.rank(histories, k, **options), []
        rows = zip(ranked.items.tolist(), ranked.scores.tolist(), self.codes[ranked.items].tolist(), strict=True)
        for n, row in enumerate(rows):
            found = [
                Recommendation(self.keys[item], self.titles[item], score, tuple(codes))
                for item, score, codes in zip(*row, strict=True)
                if item >= 0
            ]
            result.append(Recommendations(found, bool(ranked.popular[n]), int(ranked.unknown[n])))
        return result

    def where(self, predicate: str) -> list[str]:
        """Keys of the items that `column = value` or `column contains value` fits; see `Lookup.mask`."""
        return [self.keys[item] for item in self._lookup.mask(predicate).nonzero()[:, 0].tolist()]

    def rank(
        self,
        histories: "Sequence[Keys] | pl.Series",
        k: int = 10,
        exclude_seen: bool = True,
        allow: Given = None,
        block: Given = None,
        batch_size: int | None = None,
        cold_bonus: float = 0.0,
    ) -> Ranked:
        """The same as arrays. histories: a polars Series of lists of texts serves, too.

        exclude_seen: items of the whole history are not recommended. allow: the only items to recommend; block: items
        not to; for all users as keys or as a predicate of `where`, or a list with a collection of keys for each. Keys
        outside the catalogue don't count.
        batch_size: histories at once, by default 1024 on a GPU and 64 elsewhere; fewer for a large catalogue.
        cold_bonus: added to the scores of items that the training data never shows, before they are normalized.
        ValueError where k, batch_size or cold_bonus is no number or out of range, there is not one collection for each
        history, or a bonus without exact ranking.
        """
        batch_size = (1024 if self.device.type == "cuda" else 64) if batch_size is None else batch_size
        for name, value in (("k", k), ("batch_size", batch_size)):
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} = {value!r} must be a whole number, 1 or more.")
        if not isinstance(cold_bonus, Real) or not math.isfinite(cold_bonus):
            raise ValueError(f"cold_bonus = {cold_bonus!r} must be a finite number.")
        if cold_bonus and not self._exact:
            raise ValueError(
                "cold_bonus needs the ranking of the whole catalogue, and this one is searched by beams: rank the new "
                "items by themselves, with `allow`."
            )
        known, unknown = self._lookup.rows(histories)
        filters = Filters.of(self._lookup, len(unknown), known if exclude_seen else None, allow, block)
        k = min(int(k), len(self.keys))
        by_beams = max(BEAMS, k) * max(self.model.tree.fanout)
        items, scores = torch.full((len(unknown), k), -1), torch.full((len(unknown), k), float("-inf"))
        warm = known.lengths > 0
        for group, cold in ((warm.nonzero()[:, 0], False), ((~warm).nonzero()[:, 0], True)):
            if len(group) == 0:
                continue
            found, scored = [], len(self.keys) if cold or self._exact else by_beams
            for users in group.split(max(1, min(int(batch_size), MAX_LOGITS[self.device.type] // scored))):
                left_out = filters.left_out(users, self.model.tree)
                if cold:
                    found.append(self._by_popularity(len(users), k, left_out))
                else:
                    found.append(self._by_model(chosen(known, users), k, left_out, cold_bonus))
            items[group] = torch.cat([ranked.items for ranked in found]).cpu()  # only now the host waits
            scores[group] = torch.cat([ranked.scores for ranked in found]).float().cpu()
        return Ranked(items, scores, known.lengths.numpy(), unknown)

    @torch.no_grad()
    def _by_model(self, rows: JaggedTensor, k: int, left_out: LeftOut | None, cold_bonus: float) -> RankedItems:
        """rows: all consumed items. Scores are log-probabilities over the whole catalogue, whatever is left out; beams
        down the tree with an item head beside it give a lower bound."""
        history, consumed = chosen(rows, most=self.max_items).to(self.device), rows.to(self.device)
        share, encoded = self.model.item_share, self.model.encode(history, self._vectors)
        inputs = self.model, encoded, self._vectors
        if self._exact:
            found = whole_catalogue(*inputs, consumed, left_out=left_out)
            fused = found.fused(share)
            fused = fused + cold_bonus * self._cold if cold_bonus else fused
            found, total = Candidates(found.items, fused, None), fused.logsumexp(1, keepdim=True)
        else:
            found = beam_search(*inputs, max(BEAMS, k), consumed, left_out=left_out)
            total = 0.0
            if "items" in self.model.heads:
                at_once = max(1, MAX_LOGITS[self.device.type] // rows.batch_size)
                total = share * head_normalizer(*inputs, consumed, at_once)
        ranked = found.best(share, k)
        return RankedItems(ranked.items, ranked.scores - total)

    def _by_popularity(self, users: int, k: int, left_out: LeftOut | None) -> RankedItems:
        """By how often items occur in training, of equal ones the first; scores are logarithms of smoothed shares."""
        items = torch.arange(len(self.keys), device=self.device).expand(users, -1)
        if left_out is not None:
            items = items.masked_fill(left_out.leaves(users)[:, self.model.tree.item_nodes[:, -1]], -1)
        return Candidates(items, self._popularity.expand_as(items), None).best(0.0, k)
