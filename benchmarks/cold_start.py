"""Items that came after training: how often they are recommended to those who took them next.

    python -m benchmarks.cold_start dataset/sample/processed/sample --folder out/cold --draws 0 1 2 --steps 750

In each draw 5 % of a cached corpus' items are held out with all their interactions, both stages of the sample configs
are trained on the rest, and the items added to the pipeline (`modules.serving.change`). Runs stay in the folder, and
are used again: with other --steps or --gin name another one. Prints Markdown, recall over the targets of all draws:
cold users: those whose last item is a new one; cold events: all interactions with new items, given what came before;
warm users: those whose last item is an old one, "before" without the new items. Nothing consumed is recommended again.
Nearest text: by the cosine between an item's features and the mean of the history's. bonus: `cold_bonus`.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.new_items import draw, without
from data.corpus import Corpus
from modules.serving.change import changed
from modules.serving.pipeline import Pipeline
from modules.serving.recommender import Recommender

K, CHUNK = (10, 50), 512
BONUSES = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0)


def train(warm: Corpus, folder: Path, seed: int, steps: int, gin: list[str]) -> Pipeline:
    """Both stages on a corpus, as their scripts run."""
    warm.name = "warm"
    warm.save(folder / "processed" / "warm")
    common = {"train.dataset": "%data.processed.RecDataset.CUSTOM", "CustomData.name": '"warm"', "train.seed": seed}
    common["train.dataset_folder"] = f'"{folder}"'
    second = {"train.pretrained_rqvae_path": f'"{folder}/rqvae"', "train.iterations": steps}
    for stage, extra in (("rqvae", {}), ("decoder", second | {"train.save_model_every": steps})):
        own = common | extra | {"train.save_dir_root": f'"{folder}/{stage}"'}
        bindings = [f"{name} = {value}" for name, value in own.items()] + gin * (stage == "rqvae")
        flags = [text for binding in bindings for text in ("--gin", binding)]
        subprocess.run([sys.executable, f"train_{stage}.py", f"configs/{stage}_sample.gin", *flags], check=True)
    return Pipeline.load(folder / "decoder", tokenizer=True)


Targets = tuple[list[list[str]], list[str]]  # histories of item keys, and what came next


def targets(corpus: Corpus, new: set[str]) -> dict[str, Targets]:
    """Of users with three items or more."""
    found: dict[str, Targets] = {name: ([], []) for name in ("cold users", "cold events", "warm users")}
    for row in corpus.interactions.items.split(corpus.interactions.offsets.diff().tolist()):
        row = [corpus.item_keys[n] for n in row.tolist()]
        groups = [("cold events", n) for n in range(2, len(row)) if row[n] in new]
        groups += [("cold users" if row[-1] in new else "warm users", len(row) - 1)] if len(row) > 2 else []
        for group, place in groups:
            found[group][0].append(row[:place])
            found[group][1].append(row[place])
    return found


def by_model(recommender: Recommender, histories: list[list[str]], next_keys: list[str], **options) -> Tensor:
    """[M], the place of what came next among the items recommended, from 0; the largest K beyond."""
    items = recommender.rank(histories, max(K), **options).items
    return places(items, torch.tensor([recommender.index[key] for key in next_keys]))


def places(items: Tensor, target: Tensor) -> Tensor:
    hits = items == target[:, None]
    return torch.where(hits.any(1), hits.int().argmax(1), max(K))


def by_text(made: Pipeline, index: dict[str | int, int], histories, next_keys: list[str], allow: set[str]) -> Tensor:
    """The same by nearest text."""
    features, parts = torch.from_numpy(made.features).float(), []
    blocked = torch.tensor([key not in allow for key in made.semantic_ids.item_keys])
    unit = F.normalize(features, dim=1)
    for start in range(0, len(histories), CHUNK):
        rows = [[index[key] for key in row] for row in histories[start : start + CHUNK]]
        means = torch.stack([features[row].mean(0) for row in rows])
        scores = (means @ unit.T).masked_fill(blocked, -torch.inf)
        for score, row in zip(scores, rows, strict=True):
            score[row] = -torch.inf
        target = torch.tensor([index[key] for key in next_keys[start : start + CHUNK]])
        parts.append(places(scores.topk(min(max(K), int((~blocked).sum()))).indices, target))
    return torch.cat(parts)


def experiment(corpus: Corpus, folder: Path, seed: int, steps: int, gin: list[str]) -> dict[tuple[str, str], Tensor]:
    """{(what ranked, which targets): recall@K of each target [M, 2]} of one draw."""
    warm, cold = without(corpus, draw(corpus.n_items, seed))
    ready = (folder / "decoder" / "pipeline" / "pipeline.json").is_file()
    before = Pipeline.load(folder / "decoder", tokenizer=True) if ready else train(warm, folder, seed, steps, gin)
    after = changed(before, cold)
    found, new, rows = targets(corpus, set(cold.keys)), set(cold.keys), dict[tuple[str, str], Tensor]()
    old_one, one = Recommender(before), Recommender(after)
    for group, (histories, next_keys) in found.items():
        at = {}
        if group == "warm users":
            at["before"] = by_model(old_one, histories, next_keys)
        for bonus in BONUSES:
            at[f"this model, bonus {bonus:g}"] = by_model(one, histories, next_keys, cold_bonus=bonus)
        at["nearest text"] = by_text(after, one.index, histories, next_keys, set(one.keys))
        if group != "warm users":
            at["this model, new items only"] = by_model(one, histories, next_keys, allow=new)
            at["nearest text, new items only"] = by_text(after, one.index, histories, next_keys, new)
        rows |= {(name, group): (place[:, None] < torch.tensor(K)).double() for name, place in at.items()}
        for name, keys in (("random", set(one.keys)), ("random, new items only", new)):
            if name == "random" or group != "warm users":
                left = torch.tensor([len(keys) - len(keys.intersection(row)) for row in histories])
                rows[name, group] = torch.tensor(K) / left[:, None].double()
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="the folder of a cached corpus")
    parser.add_argument("--folder", type=Path, required=True, help="for the runs")
    parser.add_argument("--draws", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=750, help="of stage 2 (%(default)s)")
    parser.add_argument("--gin", action="append", default=[], metavar="BINDING", help="of stage 1; repeatable")
    arguments = parser.parse_args()
    corpus, options = Corpus.load(arguments.corpus), (arguments.steps, arguments.gin)
    draws = [experiment(corpus, arguments.folder / f"draw{n}", n, *options) for n in arguments.draws]
    groups = list(dict.fromkeys(group for _, group in draws[0]))
    cells = {row: torch.cat([hits[row] for hits in draws]) for row in draws[0]}
    counts = {group: len(next(hits for (_, own), hits in cells.items() if own == group)) for group in groups}
    print("| recall@10 / @50 | " + " | ".join(f"{group} ({counts[group]:,})" for group in groups) + " |")
    print("|---" * (1 + len(groups)) + "|")
    for name in dict.fromkeys(name for name, _ in cells):
        shown = [cells[name, group].mean(0).tolist() if (name, group) in cells else None for group in groups]
        print(
            f"| {name} | " + " | ".join(" / ".join(f"{x:.4f}" for x in pair) if pair else "" for pair in shown) + " |"
        )
