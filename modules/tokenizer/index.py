"""Semantic IDs as index.json, the form that LC-Rec, LETTER and MiniOneRec share: {"0": ["<a_183>", "<b_70>"], ...}.

    python -m modules.tokenizer.index out/rqvae_sample sample.index.json

writes IDs so; train.pretrained_rqvae_path takes such a file.
"""

import argparse
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from string import ascii_lowercase

import torch

from common.files import write_file
from data.corpus import Corpus
from modules.tokenizer.semids import SemanticIds


def read_index(path: str | Path, corpus: Corpus) -> SemanticIds:
    """The IDs of a corpus' items, with one more level where some are equal.

    The file's names are the item keys, or 0 to N - 1 in the order of the corpus. The n-th token of an item is the n-th
    letter with a code. A level has as many codes as its highest one asks for.
    Raises FileNotFoundError where there is no file; ValueError that names file and item where it has other items than
    the corpus, or tokens of another form.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file '{path}': correct train.pretrained_rqvae_path.")
    try:
        index = json.loads(Path(path).read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} can't be read as JSON: {error}") from error
    if not isinstance(index, dict):
        raise ValueError(f'{path} must hold an object of tokens by item, {{"0": ["<a_183>", "<b_70>", ...], ...}}')
    numbers = [str(number) for number in range(corpus.n_items)]
    names = min(corpus.item_keys, numbers, key=lambda names: len(index.keys() ^ names))
    known, absent = set(names), [name for name in names if name not in index]
    if odd := absent + [name for name in index if name not in known]:
        raise ValueError(
            f"{path} has {len(index):,} items, corpus '{corpus.name}' {corpus.n_items:,}; {len(odd):,} are in one of "
            f"them only, such as {odd[0]!r} in the {'corpus' if absent else 'file'}. The names must be the item keys, "
            f"such as {corpus.item_keys[0]!r}, or 0 to {corpus.n_items - 1} in the order of the corpus."
        )
    rows = [_codes(path, name, index[name]) for name in names]
    for name, row in zip(names, rows, strict=True):
        if len(row) != len(rows[0]):
            raise ValueError(f"{path}: item {name!r} has {len(row)} tokens, item {names[0]!r} has {len(rows[0])}")
    codes = torch.tensor(rows)
    identity = {"index": Path(path).name}
    ids = SemanticIds.from_codes(codes, int(codes.max()) + 1, corpus.item_keys, corpus.name, corpus.hash, identity)
    return replace(ids, level_sizes=tuple((ids.codes.amax(0) + 1).tolist()))


def _codes(path: str | Path, name: str, tokens: list[str]) -> list[int]:
    """["<a_183>", "<b_70>"] -> [183, 70]."""
    pairs = zip(ascii_lowercase, tokens if isinstance(tokens, list) else (), strict=False)
    matches = (re.fullmatch(rf"<{letter}_([0-9]{{1,9}})>", str(token)) for letter, token in pairs)
    found = [match for match in matches if match]
    if not found or len(found) < len(tokens):
        raise ValueError(f'{path}: item {name!r} has {json.dumps(tokens)[:80]}, not ["<a_183>", "<b_70>", ...]')
    return [int(match[1]) for match in found]


def write_index(path: str | Path, ids: SemanticIds, numbers: bool = False) -> None:
    """IDs by item key, or with `numbers` by the item's number in the corpus, from 0."""
    names = map(str, range(ids.n_items)) if numbers else ids.item_keys
    pairs = (zip(ascii_lowercase, row, strict=False) for row in ids.codes.tolist())
    tokens = ([f"<{letter}_{code}>" for letter, code in row] for row in pairs)
    write_file(Path(path), json.dumps(dict(zip(names, tokens, strict=True))).encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ids", help="run or tokenizer folder, semantic IDs file, or Hub id (owner/name)")
    parser.add_argument("out", help="the file to write, named .json")
    parser.add_argument(
        "--numbers", action="store_true", help="name items 0, 1, ... in the order of the corpus, not by key"
    )
    arguments = parser.parse_args()
    try:
        ids = SemanticIds.load(arguments.ids)
        write_index(arguments.out, ids, arguments.numbers)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{ids.n_items:,} items, levels {ids.level_sizes} -> {arguments.out}")


if __name__ == "__main__":
    main()
