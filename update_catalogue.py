"""Adds items to a trained pipeline and takes items out of it, without training.

    python update_catalogue.py out/decoder_sample --add items.csv --remove gone.txt --out out/decoder_sample_2

New items get IDs by the pipeline's tokenizer; IDs and vectors of all others stay. items.csv (or .tsv, .parquet, .jsonl,
.ndjson) has one item per row; gone.txt has one key per line. Writes a pipeline folder, as recommend.py reads it.
"""

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while modules load

import argparse
import shutil
from pathlib import Path

from common.files import write_file
from data.custom import CustomData
from data.histories import read_keys
from data.items import Items
from modules.card import pipeline_card
from modules.pretrained import CARD, resolve
from modules.serving.change import changed
from modules.serving.pipeline import Pipeline
from modules.tokenizer.catalogue import beside
from training import cli

KEPT = ("config.gin", "GROUPLENS.txt")  # of a pipeline, where it has them


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="run folder, pipeline folder or Hub id (owner/name)")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub repository")
    parser.add_argument("--add", type=Path, metavar="FILE", help="items to add")
    parser.add_argument("--remove", type=Path, metavar="FILE", help="keys of the items to take out, one per line")
    parser.add_argument("--out", type=Path, metavar="FOLDER", required=True, help="where to write; new or empty")
    parser.add_argument("--key", default="key", metavar="COLUMN", help="ids in the items' file (%(default)s)")
    parser.add_argument("--text", nargs="+", default=["text"], metavar="COLUMN", help="as CustomData.text_columns")
    parser.add_argument("--categories", metavar="COLUMN", help="a list, or names with | between them")
    parser.add_argument("--text-model", help="where the tokenizer's sentence encoder lies now: folder or Hub id")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error arose")
    arguments = parser.parse_args()
    if not (arguments.add or arguments.remove):
        parser.error("--add or --remove is needed")
    return arguments


def update(arguments: argparse.Namespace) -> None:
    """Writes the changed pipeline and says what changed."""
    if arguments.out.exists() and (arguments.out.is_file() or any(arguments.out.iterdir())):
        raise ValueError(f"{arguments.out} is there already: name a new folder.")
    add, remove = Items([], [], []), read_keys(arguments.remove) if arguments.remove else []
    if arguments.add:
        columns = {"text_columns": tuple(arguments.text), "category_column": arguments.categories}
        table = CustomData(items=str(arguments.add), item_column=arguments.key, **columns).catalogue()
        assert table is not None
        add = Items.read(table)
    before = Pipeline.load(arguments.pipeline, arguments.revision, tokenizer=True, text_model=arguments.text_model)
    if arguments.add and before.tokenizer is None:
        raise ValueError(
            f"{arguments.pipeline} holds no tokenizer/, which gives new items their IDs, so it can only remove: train "
            "both stages with a tokenizer that has feature sources, and take the pipeline/ of that run."
        )
    after = changed(before, add, remove)
    after.save(arguments.out)
    ids, place = after.semantic_ids, (arguments.pipeline, arguments.revision)
    write_file(arguments.out / CARD, pipeline_card(ids.corpus_name, ids.item_keys, after.counts).encode())
    for name in KEPT:
        if beside(*place, name):
            shutil.copy(resolve(*place, (name,)) / name, arguments.out)
    print(
        f"{before.semantic_ids.n_items:,} items - {len(set(remove)):,} + {len(add.keys):,} = "
        f"{after.semantic_ids.n_items:,} -> {arguments.out}"
    )


def main() -> None:
    arguments = parse()
    cli.guarded(lambda: update(arguments), arguments.traceback)


if __name__ == "__main__":
    main()
