"""Looks inside a trained pipeline: what its semantic IDs stand for, and whether its probabilities come true.

    python inspect_ids.py out/decoder_sample --item 260
    python inspect_ids.py out/decoder_sample --out out/decoder_sample/inspect

Prints what each first code stands for, or an item with its neighbours. Writes the IDs as ids.csv and ids.parquet, and
page.html, which opens without a network: the tree of IDs, code frequencies, curves of the run, held-out histories with
what is recommended and what came, and calibration.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load

import argparse
from pathlib import Path

import numpy as np

from data.histories import read_histories
from data.results import Texts, write_table
from modules.serving.inspection import HELD_OUT, HeldOut, dashed, first_codes, neighbours
from modules.serving.pipeline import Pipeline
from modules.serving.recommender import Recommender
from training import cli
from training.page import write_page


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="run folder, pipeline folder or Hub id (owner/name)")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--item", metavar="KEY", help="print this item and its neighbours alone")
    parser.add_argument("--k", type=int, default=10, help="neighbours to print (%(default)s)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write the page and the table of IDs")
    parser.add_argument(
        "--histories",
        type=Path,
        metavar="FILE",
        help=f"held-out histories for the page, the last item of each is what came; by default the run's {HELD_OUT}",
    )
    parser.add_argument("--columns", nargs=3, metavar=("USER", "ITEM", "TIME"), default=["user", "item", "timestamp"])
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    arguments = parser.parse_args()
    if arguments.histories and not arguments.out:
        parser.error("--histories are for the page: give --out")
    return arguments


def inspect(arguments: argparse.Namespace) -> None:
    """Prints what first codes stand for, and writes the files if asked to; or prints an item."""
    pipeline = Pipeline.load(arguments.pipeline, arguments.revision)
    if arguments.item is not None:
        show_item(pipeline, arguments.item, arguments.k)
        return
    run, held_out, meanings = Path(arguments.pipeline), None, first_codes(pipeline)
    file = arguments.histories or run / HELD_OUT
    if arguments.out and (arguments.histories or file.is_file()):
        rows = (row for _, rows in read_histories(file, tuple(arguments.columns)) for row in rows)
        held_out = HeldOut.of(Recommender(pipeline), rows)
    print(f"{len(pipeline.titles):,} items, {len(meanings):,} first codes in use")
    for code, of in meanings.items():
        print(f"  {code:>5}  {of.n_items:>6,} items  {', '.join(of.typical) or '-'}  | {'; '.join(of.titles[:2])}")
    if arguments.out is None:
        return
    ids, every = pipeline.semantic_ids, np.arange(len(pipeline.titles))
    columns = {"item": Texts(ids.item_keys, every), "title": Texts(pipeline.titles, every)}
    for name in ("ids.csv", "ids.parquet"):
        write_table(arguments.out / name, [columns | {"semantic_id": ids.codes.numpy()}])
    run = run if (run / "metrics.jsonl").is_file() else None
    write_page(arguments.out / "page.html", str(arguments.pipeline), pipeline, meanings, run, held_out)
    print(f"Written: ids.csv, ids.parquet and page.html in {arguments.out}")
    if held_out is None:
        print(f"The page has no histories and no calibration: there is no {file}; name a file by --histories.")


def show_item(pipeline: Pipeline, key: str, k: int) -> None:
    """An item's ID, what its first code stands for, and the items with the longest common prefixes."""
    keys, codes = pipeline.semantic_ids.item_keys, pipeline.semantic_ids.codes
    if k < 1:
        raise ValueError(f"--k {k} must be 1 or more.")
    if key not in keys:
        raise ValueError(f"--item {key}: there is no such key in the catalogue, whose keys are like {keys[:3]}.")
    item = keys.index(key)
    first = int(codes[item, 0])
    of = first_codes(pipeline)[first]
    print(f"{key}  {pipeline.titles[item]}\n  ID {dashed(codes[item].tolist())}")
    print(f"  first code {first}: {of.n_items:,} items; {', '.join(of.typical) or 'nothing is typical of them'}")
    print("Neighbours, by how many codes they share")
    for other, shared in neighbours(codes, item, k):
        print(f"  {shared}  {dashed(codes[other].tolist()):<14}{keys[other]:<12}{pipeline.titles[other]}")


def main() -> None:
    arguments = parse()
    cli.guarded(lambda: inspect(arguments), arguments.traceback)


if __name__ == "__main__":
    main()
