"""Pictures of a run, drawn from its metrics.jsonl into <run>/plots."""

import json
from pathlib import Path


def tokenizer(root: Path) -> None:
    """losses.png: the losses by step; usage.png: codes in use, entropy and collisions by step."""
    rows = _rows(root)
    train = [row for row in rows if row["split"] == "train"]
    catalogue = [row for row in rows if row["split"] == "catalogue"]
    names = [name for name in ("loss", "reconstruction_loss", "quantize_loss") if train and name in train[0]]
    _draw(root / "plots" / "losses.png", [("loss, summed over features", train, names)])
    levels = sum(name.startswith("usage_") for name in (catalogue or [{}])[0])
    usage = [f"usage_{n + 1}" for n in range(levels)]
    entropy = [f"entropy_{n + 1}" for n in range(levels)]
    panels = [
        ("share of codes in use", catalogue, usage),
        ("entropy, bits", catalogue, entropy),
        ("share of items that share their codes", catalogue, ["collision_rate"]),
    ]
    _draw(root / "plots" / "usage.png", panels)


def retriever(root: Path) -> None:
    """losses.png: training and validation loss by step; retrieval.png: validation Recall and NDCG by step."""
    rows = _rows(root)
    losses = [{**row, f"{row['split']} loss": row["loss"]} for row in rows if "loss" in row]
    _draw(root / "plots" / "losses.png", [("-log p(next item), nats", losses, ["train loss", "valid loss"])])
    ranked = [row for row in rows if row["split"] == "valid" and "loss" not in row]
    names = [name for name in (ranked or [{}])[0] if "@" in name]
    panels = [(kind, ranked, [name for name in names if name.startswith(kind.lower())]) for kind in ("Recall", "NDCG")]
    _draw(root / "plots" / "retrieval.png", panels)


def _rows(root: Path) -> list[dict]:
    return [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]


def _draw(path: Path, panels: list[tuple[str, list[dict], list[str]]]) -> None:
    """One panel for each (title of the y axis, rows, names of the curves); x is the step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    for axes, (title, rows, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 30 else "")
        axes.set_xlabel("step")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        if names:
            axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=120)
