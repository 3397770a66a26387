"""What a run prints."""

import math
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from training.checkpoint import Checkpoints


def heading(title: str, show: bool, **lines: object) -> None:
    """A title and named lines, before the progress bar."""
    if show:
        print(f"\n{title}", *(f"  {name.replace('_', ' ')}: {value}" for name, value in lines.items()), sep="\n")


def finite(tensors: dict[str, Tensor], step: int, checkpoints: Checkpoints) -> dict[str, float]:
    """The tensors as numbers, read from the device at once.

    Raises FloatingPointError that names the step and the last checkpoint where a loss is not finite.
    """
    stacked = torch.stack([tensor.detach().float() for tensor in tensors.values()])
    values = dict(zip(tensors, stacked.tolist(), strict=True))
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(
            f"The loss is {values['loss']} at step {step}; the last checkpoint is {checkpoints.marked('LAST')}. "
            "Lower train.learning_rate, or train without train.amp."
        )
    return values


def progress(total: int, first: int, show: bool) -> tqdm:
    """A bar over steps; where the output is no terminal, one line every half minute."""
    interval = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=total, initial=first, unit="step", mininterval=interval, maxinterval=interval, disable=not show)


def per_second(bar: tqdm, batch_size: int) -> str:
    """Examples a second, from the bar's rate."""
    rate = bar.format_dict["rate"]
    return f"{rate * batch_size:,.0f}/s" if rate else "?"


def table(title: str, metrics: dict[str, float], folder: Path, show: bool) -> None:
    """Two columns: name, value."""
    if not show:
        return
    width = max(map(len, metrics))
    print(f"\n{title}")
    for name, value in metrics.items():
        print(f"  {name:<{width}}  {value:.4f}" if isinstance(value, float) else f"  {name:<{width}}  {value}")
    print(f"Run folder: {folder}")


def retrieval_table(metrics: dict[str, float], split: str, excluded: bool, folder: Path, show: bool) -> None:
    """One row each for the model and the baselines, a column for each metric; `excluded`: consumed items are."""
    if not show:
        return
    names = [name.removeprefix("valid/") for name in metrics if name.startswith("valid/")]
    rows = {"most popular": "most_popular/", "transition": "transition/", "this model": ""}
    best = ", ".join(f"{name} {metrics[f'valid/{name}']:.4f}" for name in names[-2:])
    print(f"\nBest checkpoint on the validation split: {best}")
    tables = {"test": "items not yet consumed" if excluded else "all items", "test_all_items": "all items"}
    for key, candidates in tables.items():
        if f"{key}/{names[0]}" not in metrics:
            continue
        print(f"\nTest, {split} split, ranking {candidates}")
        print(" " * 22 + "".join(f"{name:>11}" for name in names))
        for row, prefix in rows.items():
            print(f"  {row:<20}" + "".join(f"{metrics[f'{key}/{prefix}{name}']:>11.4f}" for name in names))
    print(f"Run folder: {folder}")
