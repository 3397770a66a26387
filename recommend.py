"""Recommends items from a trained pipeline, for histories in a file or for item keys on the command line.

    python recommend.py out/decoder_sample --items 1 260 1196
    python recommend.py out/decoder_sample --histories histories.csv --out recommendations.parquet

The pipeline is the run folder of train_decoder.py, its pipeline/ alone, or a Hub id. Files end with .csv, .tsv,
.parquet, .jsonl or .ndjson; histories have the columns user and items (keys, oldest first; in CSV with | between them),
or user, item and timestamp with one interaction a row.
"""

import argparse
import signal
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from data.histories import Columns, partial_path, read_histories, read_keys, write_table
from modules.recommender import Recommender, as_key
from training import report

CHUNK = 8192  # histories ranked and written at once


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="run folder, pipeline folder or Hub id (owner/name)")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--items", nargs="+", metavar="KEY", help="one history, oldest first; prints its items")
    source.add_argument("--histories", type=Path, metavar="FILE")
    parser.add_argument("--out", type=Path, metavar="FILE", help="what to write for --histories")
    parser.add_argument("--columns", nargs=3, metavar=("USER", "ITEM", "TIME"), default=["user", "item", "timestamp"])
    parser.add_argument("--users", nargs="+", metavar="KEY", help="only these of the file")
    parser.add_argument("--k", type=int, default=10, help="items for each history (%(default)s)")
    parser.add_argument("--include-seen", action="store_true", help="items of the history may be recommended")
    parser.add_argument("--allow", type=Path, metavar="FILE", help="the only keys to recommend, one a line")
    parser.add_argument("--block", type=Path, metavar="FILE", help="keys not to recommend, one a line")
    devices = ["cuda"] * torch.cuda.is_available() + ["cpu"]
    parser.add_argument("--device", choices=devices, default=devices[0])
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    arguments = parser.parse_args()
    if (arguments.histories is None) != (arguments.out is None):
        parser.error("--histories and --out belong together")
    return arguments


def recommend(arguments: argparse.Namespace) -> None:
    """Prints the items for one history, or writes a table for a file of them."""
    recommender = Recommender.from_pretrained(arguments.pipeline, arguments.revision, arguments.device)
    options = {"k": arguments.k, "exclude_seen": not arguments.include_seen}
    for name in ("allow", "block"):
        if path := getattr(arguments, name):
            options[name] = keys = read_keys(path)
            if missing := sum(key not in recommender.index for key in keys):
                report.warn(f"{path}: {missing:,} of {len(keys):,} keys are not in the catalogue")
    if arguments.items:
        show(recommender, arguments.items, options)
        return
    histories, counts = read_histories(arguments.histories, tuple(arguments.columns)), {}
    if arguments.users:
        wanted = set(arguments.users)
        histories = ((user, items) for user, items in histories if as_key(user) in wanted)
    write_table(arguments.out, tables(recommender, histories, options, counts))
    print(
        f"{counts['histories']:,} histories -> {arguments.out}; {counts['unknown']:,} of {counts['items']:,} items are "
        f"not in the catalogue, and {counts['popular']:,} histories without a known item got the most popular."
    )


def tables(
    recommender: Recommender, histories: Iterator[tuple], options: dict, counts: dict[str, int]
) -> Iterator[Columns]:
    """What to write, chunk by chunk; adds to `counts`."""
    with tqdm(unit=" histories", disable=not sys.stderr.isatty()) as bar:
        while chunk := list(islice(histories, CHUNK)):
            users, rows = [as_key(user) for user, _ in chunk], [items for _, items in chunk]
            ranked = recommender.rank(rows, **options)
            found = ranked.items >= 0
            user, rank = (place.numpy() for place in found.nonzero(as_tuple=True))
            items = ranked.items[found]
            yield {
                "user": [users[n] for n in user.tolist()],
                "rank": rank + 1,
                "item": [recommender.keys[n] for n in items.tolist()],
                "title": [recommender.titles[n] for n in items.tolist()],
                "score": ranked.scores[found].numpy(),
                "semantic_id": recommender.codes[items].numpy(),
                "popular": ranked.popular[user],
            }
            new = {"histories": len(rows), "items": sum(map(len, rows))}
            new |= {"unknown": int(ranked.unknown.sum()), "popular": int(ranked.popular.sum())}
            counts.update({name: counts.get(name, 0) + count for name, count in new.items()})
            bar.update(len(rows))
    if not counts:
        raise ValueError("None of the users asked for is in the file.")


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
    """Bad input ends with one message and exit status 1; --traceback shows all."""
    arguments = parse()
    try:
        recommend(arguments)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (ValueError, OSError) as error:
        if arguments.traceback:
            raise
        part = partial_path(arguments.out) if arguments.out else None
        sys.exit(f"error: {error}" + (f"\nWhat was written so far is in {part}." if part and part.exists() else ""))


if __name__ == "__main__":
    main()
