"""What a run prints."""

import sys
import time
from pathlib import Path

from torch import nn
from tqdm import tqdm

from training.metrics import PROTOCOLS

MIN_UNIQUE = 0.5  # share of items with codes of their own
ROWS = {"most_popular": "most popular", "transition": "transition", "sasrec": "SASRec", "tree": "tree alone"}
ROWS |= {"items": "item head alone", "fused": "both", "beams": "by beams", "exact": "exact"}
SHOWN = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
GROUPS = {"target_in_training": "how often the target occurs in training", "history": "items consumed before"}


def heading(title: str, lines: dict[str, str], model: nn.Module, folder: Path, start: str) -> None:
    """A title and named lines, before the progress bar."""
    n_parameters, device = sum(p.numel() for p in model.parameters()), next(model.parameters()).device
    lines = lines | {"model": f"{n_parameters:,} parameters on {device}", "folder": folder, "start": start}
    print(f"\n{title}", *(f"  {name}: {value}" for name, value in lines.items()), sep="\n")


def progress(total: int, done: int, show: bool) -> tqdm:
    """A bar over steps; where the output is no terminal, one line every half minute."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=done, unit="step", mininterval=interval, maxinterval=interval, disable=not show)


class Speed:
    """Counts steps of training and their seconds: `start` before each, `stop` before what else is done, as evaluation.
    A GPU works behind the host: its seconds count where the host waits for it, which is to be before `stop`."""

    def __init__(self) -> None:
        self._steps, self._seconds, self._since = 0, 0.0, 0.0

    def start(self) -> None:
        self._steps, self._since = self._steps + 1, time.perf_counter()

    def stop(self) -> None:
        self._seconds += time.perf_counter() - self._since
        self._since = time.perf_counter()

    def steps_per_second(self, recording: float = 0.0) -> float:
        """Since the first step; recording: seconds among them in which steps were recorded."""
        self.stop()
        return self._steps / max(self._seconds - recording, 1e-9)


def table(title: str, metrics: dict[str, float], folder: Path) -> None:
    """Two columns: name, value."""
    width = max(map(len, metrics))
    print(f"\n{title}")
    for name, value in metrics.items():
        print(f"  {name:<{width}}  {value:.4f}" if isinstance(value, float) else f"  {name:<{width}}  {value}")
    print(f"Run folder: {folder}")


def verdict(metrics: dict[str, float], min_usage: float, is_error: bool, show: bool) -> None:
    """Says whether codebooks are in use and IDs tell items apart, from `usage_<level>` and `id_unique_share`.
    ValueError where a level uses less than min_usage of its codes; a warning instead if not is_error, and where most
    items share their codes with another."""
    usage = {name.split("_")[1]: value for name, value in metrics.items() if name.startswith("usage_")}
    low = {level: value for level, value in usage.items() if value < min_usage}
    if not low:
        if show:
            unique = metrics["id_unique_share"]
            shared = "most items share their codes with another: raise RqVae.n_layers or RqVae.codebook_size"
            found = "healthy" if unique >= MIN_UNIQUE else shared
            print(f"Verdict: {found}; every level uses {min(usage.values()):.1%} of its codes or more, ", end="")
            print(f"{unique:.1%} of the items are unique without the extra level.")
        return
    levels = ", ".join(f"level {level} uses {value:.1%} of its codes" for level, value in low.items())
    message = (
        f"Codebook collapse: {levels}, less than train.min_usage = {min_usage:.0%}. Refit the codebooks more often "
        "(train.refit_every), lower train.learning_rate or take fewer codes (RqVae.codebook_size); to keep this "
        "tokenizer as it is, set train.collapse_is_error = False."
    )
    if is_error:
        raise ValueError(message)
    if show:
        print(f"Warning: {message}")


def retrieval_table(metrics: dict[str, float], split: str, excluded: bool, folder: Path) -> None:
    """A row for each kind of scores under both protocols, what the users are, and ndcg by groups of users. metrics:
    what metrics.json holds, see `training.metrics.all_figures`, "test/" before its names. excluded: whether the
    checkpoint was chosen, and the groups are shown, by rankings without consumed items."""
    names = [name for name in SHOWN if f"test/most_popular/all/{name}" in metrics]
    rows = {row: title for row, title in ROWS.items() if f"test/{row}/all/{names[-1]}" in metrics}
    protocol = "new" if excluded else "all"
    best = ", ".join(f"{name} {metrics[f'valid/{name}']:.4f}" for name in names[-2:])
    print(f"\nBest checkpoint on the validation split, ranking {PROTOCOLS[protocol]}: {best}")
    print(f"\nTest, {split} split")
    print(" " * 18 + "".join(f"  {title:<{11 * len(names)}}" for title in PROTOCOLS.values()).rstrip())
    print(" " * 18 + ("  " + "".join(f"{name:>11}" for name in names)) * 2)
    for row, title in rows.items():
        figures = [[metrics[f"test/{row}/{kind}/{name}"] for name in names] for kind in PROTOCOLS]
        print(f"  {title:<16}" + "".join("  " + "".join(f"{value:>11.4f}" for value in half) for half in figures))
    print(
        f"{metrics['test/users']:,} users. {metrics['test/unseen_targets']:,} targets never occur in training.", end=" "
    )
    print(f"{metrics['test/consumed_targets']:,} were consumed before: misses among {PROTOCOLS['new']}.")
    if "test/distinct_share" in metrics:
        print(f"{metrics['test/distinct_share']:.1%} of the catalogue is in someone's list of ten.")
    for kind, title in GROUPS.items():
        _group_table(metrics, kind, title, names[-1], protocol, rows)
    print(f"Run folder: {folder}")


def _group_table(
    metrics: dict[str, float], kind: str, title: str, name: str, protocol: str, rows: dict[str, str]
) -> None:
    """One line for each group of users: how many there are, and each row's metric `name` over them."""
    start, end = f"test/most_popular/{protocol}/{kind}/", "/users"
    groups = [key[len(start) : -len(end)] for key in metrics if key.startswith(start) and key.endswith(end)]
    print(f"\n{name} by {title}, ranking {PROTOCOLS[protocol]}")
    print(" " * 8 + f"{'users':>10}" + "".join(f"{title:>16}" for title in rows.values()))
    for group in groups:
        figures = [metrics[f"test/{row}/{protocol}/{kind}/{group}/{name}"] for row in rows]
        print(f"  {group:<6}{metrics[start + group + end]:>10,}" + "".join(f"{value:>16.4f}" for value in figures))
