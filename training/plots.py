"""Pictures of a run, drawn from its metrics.jsonl into <run>/plots."""

import json
import math
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from training.run import step_of


def tokenizer(root: Path) -> None:
    """losses.png: the losses by step; usage.png: codes in use, perplexity and unique items by step."""
    rows = _rows(root)
    train = [row for row in rows if row["split"] == "train"]
    catalogue = [row for row in rows if row["split"] == "catalogue"]
    names = [name for name in ("loss", "reconstruction_loss", "quantize_loss") if train and name in train[0]]
    _draw(root / "plots" / "losses.png", [("loss, summed over features", train, names)])
    levels = sum(name.startswith("usage_") for name in (catalogue or [{}])[0])
    usage = [f"usage_{n + 1}" for n in range(levels)]
    perplexity = [f"perplexity_{n + 1}" for n in range(levels)]
    panels = [
        ("share of codes in use", catalogue, usage),
        ("perplexity, codes", catalogue, perplexity),
        ("share of items with codes of their own", catalogue, ["unique_share"]),
    ]
    _draw(root / "plots" / "usage.png", panels)


def codes(root: Path, codes: Tensor, codebook_size: int, categories: list[list[str]], n_categories: int = 20) -> None:
    """code_frequency.png: items of each code, most frequent first, a curve per level; categories.png: how the first
    level divides the most frequent categories, and nothing where items have none.

    codes: [N, L]. categories: of each item. Categories of more than half of the items tell nothing and are left out.
    """
    counts = [torch.bincount(level, minlength=codebook_size).sort(descending=True).values for level in codes.cpu().T]
    rows = [{"step": n} | {f"level {k + 1}": int(c[n]) for k, c in enumerate(counts)} for n in range(codebook_size)]
    names = [f"level {k + 1}" for k in range(len(counts))]
    _draw(root / "plots" / "code_frequency.png", [("items", rows, names)], "code, most frequent first")
    frequent = Counter(name for group in filter(None, categories) for name in set(group))
    shown = [name for name, count in frequent.most_common() if 2 * count <= len(categories)][:n_categories]
    if not shown:
        return
    share = torch.zeros(len(shown), codebook_size)
    for code, group in zip(codes[:, 0].tolist(), categories, strict=True):
        for name in set(group) & set(shown):
            share[shown.index(name), code] += 1
    share = share / share.sum(1, keepdim=True)
    order = (share.argmax(0) + 1 - share.amax(0)).argsort()  # codes beside others of the same category
    _heatmap(root / "plots" / "categories.png", share[:, order], shown)


def retriever(root: Path) -> None:
    """losses.png: training and validation loss by step; retrieval.png: validation Recall and NDCG by step."""
    losses, *ranked = retriever_panels(root)
    _draw(root / "plots" / "losses.png", [losses])
    _draw(root / "plots" / "retrieval.png", ranked)


def retriever_panels(root: Path) -> list[tuple[str, list[dict], list[str]]]:
    """Loss, Recall and NDCG, each a title of the y axis, rows with their "step", and names of the curves."""
    rows = _rows(root)
    losses = [{**row, f"{row['split']} loss": row["loss"]} for row in rows if "loss" in row]
    ranked = [row for row in rows if row["split"] == "valid" and "loss" not in row]
    names = [name for name in (ranked or [{}])[0] if "@" in name]
    panels = [(kind, ranked, [name for name in names if name.startswith(kind.lower())]) for kind in ("Recall", "NDCG")]
    return [("-log p(next item), nats", losses, ["train loss", "valid loss"]), *panels]


def _rows(root: Path) -> list[dict]:
    """Of metrics.jsonl, without what a crash has cut."""
    lines = (root / "metrics.jsonl").read_text(errors="replace").split("\n")
    return [json.loads(line) for line in lines if step_of(line) < math.inf]


def _draw(path: Path, panels: list[tuple[str, list[dict], list[str]]], x_label: str = "step") -> None:
    """One panel for each (title of the y axis, rows, names of the curves); x is the row's "step"."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, (title, rows, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "")
        axes.set_xlabel(x_label)
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if names:
            axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)


def _heatmap(path: Path, share: Tensor, names: list[str]) -> None:
    """share: [categories, codes], rows that sum to 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.2 + 0.25 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share.sqrt().numpy(), aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(names)), [name[:40] for name in names], fontsize=8)
    axes.set_xlabel("codes of the first level, by the category they hold most of")
    figure.colorbar(image, label="square root of the share of the category's items")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
