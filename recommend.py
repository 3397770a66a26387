"""Recommends items from a trained pipeline, for histories in a file or for item keys on the command line.

    python recommend.py out/decoder_sample --items 1 260 1196
    python recommend.py out/decoder_sample --histories histories.csv --out recommendations.parquet

The pipeline is the run folder of train_decoder.py, its pipeline/ alone, or a Hub id. Files end with .csv, .tsv,
.parquet, .jsonl or .ndjson; histories have the columns user and items (keys, oldest first; in CSV with | between them),
or user, item and timestamp with one interaction per row.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load

import argparse
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from tqdm import tqdm

from data.histories import COLUMNS, Histories, as_key, read_histories, read_keys
from data.results import Columns, Texts, partial_path, write_table
from modules.serving.lookup import PREDICATE
from modules.serving.recommender import Ranked, Recommender
from training import cli, distributed

CHUNKS = {"cpu": 2048, "cuda": 32_768}  # histories that a process ranks before they are written


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="run folder, pipeline folder or Hub id (owner/name)")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--items", nargs="+", metavar="KEY", help="one history, oldest first; prints its items")
    what = "a file, or the folder of a data set that was trained on"
    source.add_argument("--histories", type=Path, metavar="PATH", help=what)
    parser.add_argument("--out", type=Path, metavar="FILE", help="what to write for --histories")
    parser.add_argument("--columns", nargs=3, metavar=("USER", "ITEM", "TIME"), default=COLUMNS)
    parser.add_argument("--users", nargs="+", metavar="KEY", help="only these of --histories")
    parser.add_argument("--k", type=int, default=10, help="items for each history (%(default)s)")
    parser.add_argument("--include-seen", action="store_true", help="items of the history may be recommended")
    parser.add_argument("--cold-bonus", type=float, default=0.0, help="added to scores of items new since training")
    what = "a file with a key per line, or a predicate such as 'categories = Horror' or 'title contains star'"
    parser.add_argument("--allow", metavar="WHAT", help=f"the only items to recommend: {what}")
    parser.add_argument("--block", metavar="WHAT", help="items not to recommend, likewise")
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    arguments = parser.parse_args()
    if (arguments.histories is None) != (arguments.out is None):
        parser.error("--histories and --out belong together")
    for name, default in (("users", None), ("columns", COLUMNS)):
        if arguments.items and getattr(arguments, name) != default:
            parser.error(f"--{name} belongs to --histories, and --items is one history")
    return arguments


@dataclass
class Counts:
    """Of the histories of `path` so far. missing: users asked for and not found. key: the first one of an item."""

    path: Path
    missing: set[str]
    histories: int = 0
    items: int = 0
    unknown: int = 0
    popular: int = 0
    empty: int = 0
    key: object = None

    def add(self, users: list[str], rows, ranked: Ranked) -> None:
        self.missing.difference_update(users)
        self.histories += len(users)
        self.items += int((ranked.known + ranked.unknown).sum())
        self.unknown += int(ranked.unknown.sum())
        self.popular += int(ranked.popular.sum())
        self.empty += int((ranked.items < 0).all(1).sum())
        if self.key is None:
            self.key = next((key for row in rows if row is not None for key in row), None)

    def tell(self, out: Path, keys: list[str]) -> None:
        """The last line, and what may have gone wrong. keys: of the catalogue."""
        print(
            f"{self.histories:,} histories -> {out}; {self.unknown:,} of {self.items:,} items are not in the "
            f"catalogue, {self.popular:,} histories without a known item got the most popular, and {self.empty:,} got "
            "nothing, as no item was left."
        )
        if self.missing:
            some = ", ".join(sorted(self.missing)[:3])
            warn(f"{self.path} lacks {len(self.missing):,} of the users asked for, such as {some}")
        if self.items and self.unknown == self.items:
            warn(
                f"{self.path}: no item's key is in the catalogue: the first is {as_key(self.key)!r}, the catalogue has "
                f"keys like {keys[0]!r}. Keys in a text have | between them."
            )


def recommend(arguments: argparse.Namespace) -> None:
    """Prints the items for one history, or writes a table for a file of them."""
    if arguments.out and arguments.out.resolve() == arguments.histories.resolve():
        raise ValueError(f"--out {arguments.out} would take the place of the histories: name another file.")
    accelerator = distributed.start(cpu=arguments.device == "cpu")
    recommender = Recommender.from_pretrained(arguments.pipeline, arguments.revision, accelerator.device)
    options = {"k": arguments.k, "exclude_seen": not arguments.include_seen, "cold_bonus": arguments.cold_bonus}
    for name in ("allow", "block"):
        if given := getattr(arguments, name):
            options[name] = wanted(recommender, name, given)
    if arguments.items and accelerator.is_main_process:
        show(recommender, arguments.items, options)
    elif arguments.histories:
        only = set(arguments.users) if arguments.users else None
        size = CHUNKS[accelerator.device.type] * accelerator.num_processes
        histories = read_histories(arguments.histories, tuple(arguments.columns), only, size)
        counts = Counts(arguments.histories, set(only or ()))
        chunks = tables(recommender, histories, options, accelerator, counts)
        if accelerator.is_main_process:
            write_table(arguments.out, chunks)
            counts.tell(arguments.out, recommender.keys)
        else:
            for _ in chunks:  # take part in ranking them
                pass
    distributed.end(accelerator)


def wanted(recommender: Recommender, name: str, given: str) -> list[str] | str:
    """A file's keys, or a predicate as it is."""
    if not Path(given).is_file():
        if PREDICATE.fullmatch(given):
            return given
        raise ValueError(f"--{name} {given!r} is neither a file nor a predicate such as 'categories = Horror'")
    keys = read_keys(Path(given))
    if name == "allow" and not keys:
        raise ValueError(f"--allow {given}: the file holds no key; write one per line, or leave --allow out")
    if missing := sum(key not in recommender.index for key in keys):
        warn(f"{given}: {missing:,} of {len(keys):,} keys are not in the catalogue")
    return keys


def tables(
    recommender: Recommender,
    histories: Iterable[Histories],
    options: dict,
    accelerator: Accelerator,
    counts: Counts,
) -> Iterator[Columns]:
    """What to write, chunk by chunk; adds to `counts`."""
    shown = sys.stderr.isatty() and accelerator.is_main_process
    with tqdm(unit=" histories", disable=not shown) as bar:
        for users, rows in histories:
            ranked = rank(recommender, rows, options, accelerator)
            found = ranked.items >= 0
            user, place = (index.numpy() for index in found.nonzero(as_tuple=True))
            items = ranked.items[found]
            yield {
                "user": Texts(users, user),
                "rank": place + 1,
                "item": Texts(recommender.keys, items.numpy()),
                "title": Texts(recommender.titles, items.numpy()),
                "score": ranked.scores[found].numpy(),
                "semantic_id": recommender.codes[items].numpy(),
                "popular": ranked.popular[user],
            }
            counts.add(users, rows, ranked)
            bar.update(len(users))
    if not counts.histories:
        raise ValueError(f"None of the users asked for is in {counts.path}, such as {min(counts.missing)}.")


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


def rank(recommender: Recommender, rows, options: dict, accelerator: Accelerator) -> Ranked:
    """`Recommender.rank`, of which each process of the launch does its share."""
    if accelerator.num_processes == 1:
        return recommender.rank(rows, **options)
    share = -(-len(rows) // accelerator.num_processes)
    first = share * accelerator.process_index
    own = recommender.rank(rows[first : first + share], **options)
    counts = torch.from_numpy(np.stack([own.known, own.unknown], 1))
    parts = torch.cat([own.items, counts], 1), own.scores
    padded = (F.pad(part, (0, 0, 0, share - len(part))).to(accelerator.device) for part in parts)
    whole, scores = (accelerator.gather(part)[: len(rows)].cpu() for part in padded)
    return Ranked(whole[:, :-2], scores, *whole[:, -2:].numpy().T)


def show(recommender: Recommender, items: list[str], options: dict) -> None:
    """Prints the titles of a history and of what is recommended."""
    [found] = recommender.recommend([items], **options)
    print("History")
    for key in items:
        known = key in recommender.index
        print(f"  {key:<12}{recommender.titles[recommender.index[key]] if known else 'not in the catalogue'}")
    print("Recommended" + ", as the most popular: no item of the history is known" * found.popular)
    for rank, item in enumerate(found.items, 1):
        print(f"  {rank:>3}  {item.score:>7.3f}  {item.key:<12}{item.title}  {list(item.semantic_id)}")


def main() -> None:
    arguments = parse()
    part = partial_path(arguments.out) if arguments.out else None
    cli.guarded(lambda: recommend(arguments), arguments.traceback, part)


if __name__ == "__main__":
    main()
