"""From histories of item keys to ranked items of a catalogue."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.schemas import RankedItems
from data.strings import unpack_strings
from modules.generation.beam_search import Candidates, LeftOut, beam_search, head_logits, whole_catalogue
from modules.model import EncoderDecoderRetrievalModel
from modules.pipeline import CATALOGUE, open_pipeline
from modules.tokenizer.semids import SemanticIds, load_item_features
from modules.tree import Tree
from ops.jagged import JaggedTensor, lengths_to_offsets

MAX_EXACT = 500_000  # items up to which the whole catalogue is ranked
MAX_LOGITS = 2**24  # users x items that are scored at once
BEAMS = 50
Keys = Collection[str | int]


@dataclass(frozen=True)
class Ranked:
    """K items of each of B users, best first, on the CPU.

    items: [B, K] int64, -1 where fewer are left; scores: [B, K] float32, log-probabilities, -inf there. popular: [B],
    whether no item of the history is known and the most popular ones come. unknown: [B], how many were not.
    """

    items: Tensor
    scores: Tensor
    popular: np.ndarray
    unknown: np.ndarray


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
    """Ranks the items of a catalogue for histories of item keys.

    keys, titles: [N]; codes: [N, L'] int64, the semantic IDs; index: {key: item}. Nothing is kept between calls.
    """

    def __init__(
        self,
        model: EncoderDecoderRetrievalModel,
        semantic_ids: SemanticIds,
        titles: list[str],
        counts: Tensor,
        max_items: int,
    ) -> None:
        """model: in evaluation mode, on the device to compute on; the others as of `save_pipeline`."""
        self.model, self.max_items, self.device = model, max_items, model.tree.leaf_items.device
        self.keys, self.titles, self.codes = semantic_ids.item_keys, titles, semantic_ids.codes
        self.index = {key: n for n, key in enumerate(self.keys)}
        with torch.no_grad():
            self._vectors = model.vectors()
        smoothed = counts.double() + 1
        self._popularity = (smoothed / smoothed.sum()).log().float().to(self.device)  # [N]
        small = semantic_ids.n_items <= MAX_EXACT or "tree" not in model.heads
        self._exact = model.decoder is None and small

    @staticmethod
    def from_pretrained(
        path: str | Path, revision: str | None = None, device: torch.device | str = "cpu"
    ) -> "Recommender":
        """path: a run of train_decoder.py, its pipeline folder, or a Hub id (`owner/name`) at `revision`.

        FileNotFoundError or ValueError names what is missing, damaged or of another format; see `resolve`, too.
        """
        folder, header = open_pipeline(path, revision)
        semantic_ids, catalogue = SemanticIds.load(folder), load_file(folder / CATALOGUE)
        features = load_item_features(folder, None, semantic_ids)
        features = torch.from_numpy(features).to(device) if features is not None else None
        tree = Tree.build(semantic_ids.codes, semantic_ids.level_sizes).to(device)
        model = EncoderDecoderRetrievalModel.from_pretrained(folder, tree, features)
        titles = unpack_strings(catalogue["title_data"], catalogue["title_offsets"])
        return Recommender(model, semantic_ids, titles, catalogue["counts"], header["max_items"])

    def recommend(self, histories: Sequence[Sequence[str | int]], k: int = 10, **options) -> list[Recommendations]:
        """The k best items for each history of item keys, oldest first, or all that are left. options: of `rank`."""
        ranked, result = self.rank(histories, k, **options), []
        rows = zip(ranked.items.tolist(), ranked.scores.tolist(), strict=True)
        for n, (items, scores) in enumerate(rows):
            pairs = [(item, score) for item, score in zip(items, scores, strict=True) if item >= 0]
            found = [Recommendation(self.keys[i], self.titles[i], s, tuple(self.codes[i].tolist())) for i, s in pairs]
            result.append(Recommendations(found, bool(ranked.popular[n]), int(ranked.unknown[n])))
        return result

    def rank(
        self,
        histories: Sequence[Sequence[str | int]],
        k: int = 10,
        exclude_seen: bool = True,
        allow: Keys | Sequence[Keys] | None = None,
        block: Keys | Sequence[Keys] | None = None,
        batch_size: int | None = None,
    ) -> Ranked:
        """The same as arrays.

        exclude_seen: items of the whole history are not recommended. allow: the only items to recommend; block: items
        not to; of all users, or a list with a collection of keys for each. Keys outside the catalogue don't count.
        batch_size: histories at once, by default 1024 on a GPU and 64 elsewhere; fewer for a large catalogue.
        ValueError where k is below 1, or there is not one collection for each history.
        """
        batch_size = (1024 if self.device.type == "cuda" else 64) if batch_size is None else batch_size
        if k < 1 or batch_size < 1:
            raise ValueError(f"k = {k} and batch_size = {batch_size} must be 1 or more.")
        known = [self._known(history) for history in histories]
        filters = _Filters.of(self, len(known), allow, block, exclude_seen)
        items = torch.full((len(known), min(k, len(self.keys))), -1)
        scores = torch.full(items.shape, float("-inf"))
        size = max(1, min(batch_size, MAX_LOGITS // len(self.keys)))
        warm, cold = ([n for n, row in enumerate(known) if bool(row) == some] for some in (True, False))
        for group, ranking in ((warm, self._by_model), (cold, self._by_popularity)):
            for start in range(0, len(group), size):
                users = group[start : start + size]
                rows = [known[n] for n in users]
                ranked = ranking(rows, items.shape[1], filters.left_out(users, rows))
                items[users], scores[users] = ranked.items.cpu(), ranked.scores.float().cpu()
        unknown = [len(history) - len(row) for history, row in zip(histories, known, strict=True)]
        return Ranked(items, scores, np.array([not row for row in known], bool), np.array(unknown, np.int64))

    def _known(self, keys: Keys) -> list[int]:
        """The items with these keys, without those that the catalogue lacks. ValueError where they are no keys."""
        if keys is None or isinstance(keys, str):
            raise ValueError(f"Items are given as a list of their keys, not as {keys!r}.")
        for key in keys:
            if not isinstance(key, (str, int, float, np.integer, np.floating)):
                raise ValueError(f"An item's key is a text or a number, not {key!r}.")
        item_of = self.index.get
        return [n for key in keys if (n := item_of(key if isinstance(key, str) else as_key(key))) is not None]

    @torch.no_grad()
    def _by_model(self, rows: list[list[int]], k: int, left_out: LeftOut | None) -> RankedItems:
        """Scores are log-probabilities over the whole catalogue, whatever is left out; beams down the tree with an
        item head beside it give a lower bound."""
        history = jagged([row[-self.max_items :] for row in rows], self.device, self.max_items)
        consumed, share = jagged(rows, self.device), self.model.item_share
        if self._exact:
            found = whole_catalogue(self.model, history, self._vectors, consumed, left_out=left_out)
            total = found.fused(share).logsumexp(1, keepdim=True)
        else:
            found = beam_search(self.model, history, self._vectors, max(BEAMS, k), consumed, left_out=left_out)
            total = 0.0
            if "items" in self.model.heads:
                encoded = self.model.encode(history, self._vectors)
                logits = head_logits(self.model, encoded, self._vectors, consumed)
                total = share * logits.logsumexp(1, keepdim=True)
        ranked = found.best(share, k)
        return RankedItems(ranked.items, ranked.scores - total)

    def _by_popularity(self, rows: list[list[int]], k: int, left_out: LeftOut | None) -> RankedItems:
        """By how often items occur in training, of equal ones the first; scores are logarithms of smoothed shares."""
        items = torch.arange(len(self.keys), device=self.device).expand(len(rows), -1)
        if left_out is not None:
            items = items.masked_fill(left_out.leaves(len(rows))[:, self.model.tree.item_nodes[:, -1]], -1)
        return Candidates(items, self._popularity.expand_as(items), None).best(0.0, k)


@dataclass(frozen=True)
class _Filters:
    """What a call leaves out. for_all: [N] bool, or None; allow, block: sets of items of each user, or None."""

    tree: Tree
    for_all: Tensor | None
    allow: list[set[int]] | None
    block: list[set[int]] | None
    seen: bool

    @staticmethod
    def of(recommender: Recommender, users: int, allow, block, seen: bool) -> "_Filters":
        """From the arguments of `Recommender.rank`."""
        tree, sets, for_all = recommender.model.tree, {}, None
        for name, keys in (("allow", allow), ("block", block)):
            each = isinstance(keys, (list, tuple)) and any(
                isinstance(key, (set, frozenset, list, tuple)) for key in keys
            )
            if each and len(keys) != users:
                raise ValueError(f"{name} has {len(keys)} collections of keys for {users} histories.")
            sets[name] = [set(recommender._known(row)) for row in keys] if each else None
            if keys is not None and not each:
                listed = torch.zeros(tree.n_items, dtype=torch.bool)
                listed[recommender._known(keys)] = True
                gone = listed if name == "block" else ~listed
                for_all = gone if for_all is None else for_all | gone
        for_all = for_all.to(tree.leaf_items.device) if for_all is not None else None
        return _Filters(tree, for_all, sets["allow"], sets["block"], seen)

    def left_out(self, users: list[int], rows: list[list[int]]) -> LeftOut | None:
        """For some of the users, who have consumed the items `rows`."""
        gone = [set(row) if self.seen else set() for row in rows]
        if self.block is not None:
            gone = [row | self.block[n] for n, row in zip(users, gone, strict=True)]
        if self.allow is not None:
            gone = [self.allow[n] - row for n, row in zip(users, gone, strict=True)]
        elif self.for_all is None and not any(gone):
            return None
        return LeftOut.of(jagged(gone, self.tree.leaf_items.device), self.tree, self.for_all, self.allow is not None)


def as_key(value: object) -> str:
    """A key that a file has as a number."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def jagged(rows: Sequence[Collection[int]], device: torch.device, max_length: int | None = None) -> JaggedTensor:
    """Rows of item ids; max_length: a bound on their lengths, otherwise the longest."""
    lengths = [len(row) for row in rows]
    values = torch.from_numpy(np.fromiter(chain.from_iterable(rows), np.int64, sum(lengths)))
    offsets = lengths_to_offsets(torch.tensor(lengths))
    return JaggedTensor(values.to(device), offsets.to(device), max_length or max(lengths))
