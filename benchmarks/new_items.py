"""Codes of items that nobody has consumed yet: how sensible they are, by `RqVae.drop_interactions`.

    python -m benchmarks.new_items dataset/sample/processed/sample --drop 0 0.1 0.2 0.3 --seeds 0 1 2

5 % of a cached corpus' items are held out, with all their interactions; the sample config's tokenizer is trained on
the others (warm), and gives those held out (cold) their codes by text alone. Prints Markdown, means over the seeds.
Agreement: of an item's ten nearest warm items by text, the share with its first code. Hidden: the warm items' first
codes that stay when their interactions are hidden.
"""

import argparse
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tokenizer import train
from common.schemas import Interactions
from data.cooccurrence import CoOccurrenceSvd
from data.corpus import Corpus
from data.encoders import TfidfSvd
from data.features import item_features
from data.items import Items
from data.splits import leave_one_out
from ops.jagged import lengths_to_offsets, row_indices
from training.metrics import collisions, neighbour_agreement

SAMPLE = {"embed_dim": 64, "hidden_dims": (256, 128), "n_layers": 2, "separate_collisions": False}
SOURCES = TfidfSvd(256), CoOccurrenceSvd(128, 3)
SHARE = 0.05


def draw(n_items: int, seed: int) -> Tensor:
    """[N] bool: which items are held out."""
    gone = torch.zeros(n_items, dtype=torch.bool)
    gone[torch.randperm(n_items, generator=torch.Generator().manual_seed(seed))[: round(SHARE * n_items)]] = True
    return gone


def without(corpus: Corpus, gone: Tensor) -> tuple[Corpus, Items]:
    """The corpus less some items, gone [N] bool, and their interactions; and the items that went."""
    rows, interactions = gone.tolist(), corpus.interactions
    kept = ~gone[interactions.items.long()]
    users = row_indices(interactions.offsets, len(interactions))[kept]
    lengths = torch.bincount(users, minlength=interactions.n_users)
    number = (~gone).cumsum(0) - 1
    items = number[interactions.items[kept].long()].int()
    left = Interactions(items, lengths_to_offsets(lengths[lengths > 0]))
    users = [key for key, length in zip(corpus.user_keys, lengths.tolist(), strict=True) if length]
    every = [*zip(rows, corpus.item_keys, corpus.texts(), corpus.categories(), strict=True)]
    parts = ([item[1:] for item in every if item[0] == away] for away in (False, True))
    fields = (map(list, zip(*part, strict=True)) for part in parts)
    warm, cold = (Items(keys, texts, groups) for keys, texts, groups in fields)
    return Corpus.build(corpus.name, left, warm.keys, users, warm.texts, warm.categories), cold


def agreement(codes: Tensor, text: Tensor, others: Tensor, other_text: Tensor, skip_own: bool) -> float:
    """Of each item's ten nearest others by text, the share with its first code. Shape: codes [M], text [M, D]."""
    similarity = F.normalize(text, dim=1) @ F.normalize(other_text, dim=1).T
    if skip_own:
        similarity.fill_diagonal_(-2)
    return float((others[similarity.topk(10).indices] == codes[:, None]).double().mean())


def figures(corpus: Corpus, drops: list[float], seed: int) -> list[dict[str, float]]:
    """One row a share that is dropped."""
    corpus, cold_items = without(corpus, draw(corpus.n_items, seed))
    with tempfile.TemporaryDirectory() as folder:
        described = item_features(corpus, SOURCES, folder, leave_one_out(corpus.interactions).train_lengths)
        warm, fitted = torch.from_numpy(described.values), described.fitted
        cold = torch.from_numpy(fitted.transform(cold_items))
    rows, hidden, text = [], warm.masked_fill(torch.from_numpy(fitted.from_interactions), 0.0), SOURCES[0].dim
    for drop in drops:
        options = SAMPLE | {"drop_interactions": drop, "from_interactions": fitted.from_interactions}
        model = train(warm, options, seed, 1000, 1024, 1e-3, 250).eval()
        codes = model.codes(warm)
        first, parts = codes[:, 0], (codes[:, 0], warm[:, :text])
        row = {"drop": drop, "cold agreement": agreement(model.codes(cold)[:, 0], cold[:, :text], *parts, False)}
        row["warm agreement"] = agreement(*parts, *parts, True)
        row["hidden"] = float((model.codes(hidden)[:, 0] == first).double().mean())
        row["neighbours by all features, warm"] = neighbour_agreement(codes, warm)["neighbours_sharing_1"]
        interactions = warm[:, torch.from_numpy(fitted.from_interactions)]
        row["neighbours by interactions, warm"] = neighbour_agreement(codes, interactions)["neighbours_sharing_1"]
        row |= {"loss, warm": model.losses(warm)["reconstruction_loss"]}
        rows.append(row | {"unique, warm": collisions(codes)["unique_share"]})
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="the folder of a cached corpus")
    parser.add_argument("--drop", nargs="+", type=float, default=[0.0, 0.2])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    arguments = parser.parse_args()
    runs = [figures(Corpus.load(arguments.corpus), arguments.drop, seed) for seed in arguments.seeds]
    print("| " + " | ".join(runs[0][0]) + " |\n" + "|---" * len(runs[0][0]) + "|")
    for same in zip(*runs, strict=True):
        print("| " + " | ".join(f"{np.mean([row[name] for row in same]):.4g}" for name in same[0]) + " |")
