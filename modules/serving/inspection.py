"""What semantic IDs stand for, and whether the probabilities of a retriever come true."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from common.files import write_file
from common.schemas import Samples
from data.corpus import Corpus
from data.histories import as_key
from modules.serving.pipeline import Pipeline
from modules.serving.recommender import Recommender

HELD_OUT, MAX_HELD_OUT = "held_out.jsonl", 2000  # of a run, and how many histories it has at most
WORD = re.compile(r"[^\W\d_]{3,}")
MAX_RANKED = 1000  # items of each history that calibration looks at


def save_held_out(path: Path, corpus: Corpus, tasks: Samples) -> None:
    """Histories with what came, evenly among the tasks of a split, as JSON lines that `read_histories` reads: user, and
    items, of which the last came next."""
    offsets, lines = corpus.interactions.offsets, []
    chosen = slice(None, None, -(-len(tasks) // MAX_HELD_OUT))
    for user, position in zip(tasks.user[chosen].tolist(), tasks.position[chosen].tolist(), strict=True):
        start = int(offsets[user])
        items = corpus.interactions.items[start : start + position + 1].tolist()
        lines.append({"user": corpus.user_keys[user], "items": [corpus.item_keys[n] for n in items]})
    write_file(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())


def dashed(codes: Sequence[int]) -> str:
    """A semantic ID, or a prefix of one, as text."""
    return "-".join(map(str, codes))


def neighbours(codes: Tensor, item: int, k: int) -> list[tuple[int, int]]:
    """Up to k other items that share the first code, those with the longest common prefix first, and its length. Shape:
    codes [N, L']."""
    shared = (codes == codes[item]).long().cumprod(1).sum(1)
    shared[item] = 0
    best = shared.argsort(descending=True, stable=True)[:k].tolist()
    return [(n, int(shared[n])) for n in best if shared[n] > 0]


def typical(labels: Sequence[Iterable[str]], groups: Sequence[int], k: int) -> dict[int, list[str]]:
    """Of each group the up to k labels that tell it best from all others, the best first.

    labels, groups: [N], what each item is described by, and where it belongs. With p and q the shares of items that
    have a label within the group and elsewhere, the score is p log(p / q) + (1 - p) log((1 - p) / (1 - q)), the
    log-likelihood ratio of Dunning 1993, where p > q. A label of one item, or one with less than 3 nats over the whole
    group, tells nothing.
    """
    inside, sizes = defaultdict[int, Counter[str]](Counter), Counter(groups)
    for group, names in zip(groups, labels, strict=True):
        inside[group].update(set(names))
    everywhere = Counter(name for names in labels for name in set(names))
    result = {}
    for group, size in sizes.items():
        names = [name for name, count in inside[group].items() if count > 1]
        counts = torch.tensor([(inside[group][name], everywhere[name]) for name in names]).view(-1, 2).double()
        p = counts[:, 0] / size
        q = (counts[:, 1] - counts[:, 0] + 1) / (len(groups) - size + 2)  # never 0 or 1
        score = torch.special.xlogy(p, p / q) + torch.special.xlogy(1 - p, (1 - p) / (1 - q))
        score = size * score.where(p > q, 0.0)
        order = score.argsort(descending=True, stable=True)[:k].tolist()
        result[group] = [names[n] for n in order if score[n] >= 3]
    return result


@dataclass(frozen=True)
class Code:
    """n_items: how many have it. typical: what tells them from other items. titles: of the most popular ones."""

    n_items: int
    typical: list[str]
    titles: list[str]


def first_codes(pipeline: Pipeline, k: int = 5) -> dict[int, Code]:
    """What each first code in use stands for: up to k words of titles and values of item columns, and k titles."""
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    groups, members = pipeline.semantic_ids.codes[:, 0].tolist(), defaultdict(list)
    for item in pipeline.counts.argsort(descending=True, stable=True).tolist():
        members[groups[item]].append(pipeline.titles[item])
    labels = [{*WORD.findall(title.lower())} - ENGLISH_STOP_WORDS for title in pipeline.titles]
    for column in pipeline.columns.values():
        labels = [names.union(map(str.lower, values)) for names, values in zip(labels, column, strict=True)]
    tells = typical(labels, groups, k)
    return {code: Code(len(titles), tells[code], titles[:k]) for code, titles in sorted(members.items())}


@dataclass(frozen=True)
class HeldOut:
    """B histories of item keys, oldest first, and what came next: targets [B] int64, items of the recommender.
    left_out: how many more there were, whose next item or all of whose history the catalogue lacks."""

    recommender: Recommender
    histories: list[list[str]]
    targets: Tensor
    left_out: int

    @staticmethod
    def of(recommender: Recommender, rows: Iterable[Iterable[str | int]]) -> "HeldOut":
        """rows: item keys, the last of which came next. ValueError where no row can be used."""
        index, texts = recommender.index, [[as_key(key) for key in row] for row in rows]
        kept = [row for row in texts if row and row[-1] in index and any(key in index for key in row[:-1])]
        if not kept:
            raise ValueError(
                f"None of the {len(texts):,} histories ends with an item of the catalogue after another one."
            )
        targets = torch.tensor([index[row[-1]] for row in kept])
        return HeldOut(recommender, [row[:-1] for row in kept], targets, len(texts) - len(kept))


@dataclass(frozen=True)
class Calibration:
    """Pairs of a history and an item by their predicted probability, in bins of a factor of two.

    predicted, came: [bins] float64, mean probability, and the share of the pairs whose item came. low, high: [bins],
    95 % interval of `came` (Jeffreys). pairs: [bins] int64. top, recall: mean probability of the ten best items
    together, and in how many histories one of them came.
    """

    predicted: Tensor
    came: Tensor
    low: Tensor
    high: Tensor
    pairs: Tensor
    top: float
    recall: float

    @staticmethod
    def of(held_out: HeldOut) -> "Calibration":
        """Of the 1,000 best items of each history, consumed ones included."""
        ranked = held_out.recommender.rank(held_out.histories, MAX_RANKED, exclude_seen=False)
        return calibration(ranked.scores, ranked.items == held_out.targets[:, None])


def calibration(scores: Tensor, came: Tensor) -> Calibration:
    """scores: [B, K] log-probabilities, best first; came: [B, K] bool. Bins that promise less than 3 hits are left
    out."""
    from scipy.stats import beta

    p = scores.double().exp()
    bins = -(scores.double() / torch.log(torch.tensor(2.0))).clamp(-40, 0).floor().long().flatten()  # 2^-b <= p
    pairs = torch.bincount(bins)
    promised, hits = (torch.bincount(bins, x.flatten().double()) for x in (p, came))
    shown = promised >= 3
    pairs, promised, hits = pairs[shown], promised[shown], hits[shown]
    low, high = (torch.from_numpy(beta.ppf(q, hits + 0.5, pairs - hits + 0.5)) for q in (0.025, 0.975))
    top, recall = float(p[:, :10].sum(1).mean()), float(came[:, :10].any(1).double().mean())
    return Calibration(promised / pairs, hits / pairs, low, high, pairs, top, recall)
