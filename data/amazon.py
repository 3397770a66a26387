"""Amazon reviews 2014, 5-core: in the layout of the P5 archive, or as the review files it was made from.

| split  | users  | items  | interactions |
|--------|--------|--------|--------------|
| beauty | 22,363 | 12,101 | 198,502      |
| toys   | 19,412 | 11,924 | 167,597      |

P5: Geng et al. 2022, https://github.com/jeykigung/P5. Reviews: McAuley et al. 2015, one file per category.
"""

import ast
import gzip
import html
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch

from common.schemas import Interactions
from data.corpus import Corpus
from data.download import RemoteFile
from data.events import factorize, k_core, sequences
from data.lines import parsed
from ops.jagged import lengths_to_offsets

CATEGORIES = {"beauty": "Beauty", "sports": "Sports_and_Outdoors", "toys": "Toys_and_Games"}
FILES = ("sequential_data.txt", "datamaps.json", "meta.json.gz")
P5_URL = "https://drive.usercontent.google.com/download?id=1qGxgmx7G_WB7JE4Cn_bEcZ_o_NAJLE3G&export=download&confirm=t"
REVIEW_URLS = (
    "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/",
    "https://mcauleylab.ucsd.edu/public_datasets/data/amazon/categoryFiles/",
)
CORE = 5
UNKNOWN = "Unknown item."
T = TypeVar("T")


def sources(split: str) -> tuple[tuple[RemoteFile, ...], ...]:
    """The sources of a split, the preferred first: the P5 archive; reviews and metadata of its category, both without
    checksums."""
    reviews = [f"reviews_{CATEGORIES[split]}_{CORE}.json.gz", f"meta_{CATEGORIES[split]}.json.gz"]
    p5 = RemoteFile("P5_data.zip", (P5_URL,), members={name: f"{split}/{name}" for name in FILES})
    return (p5,), tuple(RemoteFile(name, tuple(url + name for url in REVIEW_URLS)) for name in reviews)


def read_amazon(folder: Path, name: str) -> Corpus:
    """Reads sequential_data.txt, datamaps.json and meta.json.gz from `folder`. Item id = P5's number - 1; users come in
    the order of sequential_data.txt, their items in time order. P5 keeps no timestamps. Items without metadata get a
    text that says so. ValueError names file and line of a defect."""
    numbers = _read_datamaps(folder / "datamaps.json")
    users, rows = _read_sequences(folder / "sequential_data.txt", numbers)
    items = torch.tensor([item for row in rows for item in row], dtype=torch.int32)
    interactions = Interactions(items, lengths_to_offsets(torch.tensor([len(row) for row in rows])))
    keys = list(numbers["user2id"])
    user_keys = [keys[user] for user in users]
    return _with_metadata(name, interactions, list(numbers["item2id"]), user_keys, folder / "meta.json.gz")


def read_reviews(reviews: Path, metadata: Path, name: str) -> Corpus:
    """Builds the sequences of P5 from the reviews of a category and adds its metadata.

    reviews: gzip, one JSON object per line with reviewerID, asin and unixReviewTime. Users come in the order of the
    file, their items by time with ties in file order, items in the order in which these sequences name them: the
    numbering of P5. Only what remains of the 5-core counts. Unlike P5 it keeps the timestamps. ValueError names file
    and line of a defect.
    """
    import polars as pl

    schema = {"user": pl.String, "item": pl.String, "timestamp": pl.Int64}
    events = k_core(pl.DataFrame(list(_parsed(reviews, _review)), schema, orient="row"), CORE)
    if events.is_empty():
        raise ValueError(f"{reviews}: no user and item have {CORE} reviews each")
    user_keys, users = factorize(events["user"])
    events = events.with_columns(user=users).sort("user", "timestamp", maintain_order=True)
    item_keys, items = factorize(events["item"])
    _, interactions = sequences(events.with_columns(item=items))
    return _with_metadata(name, interactions, item_keys, user_keys, metadata)


def _parsed(path: Path, parse: Callable[[bytes], T]) -> Iterator[T]:
    """What `parse` makes of each line of a gzip file; its ValueError, and one of the file, names the line."""
    line_number = 1
    with gzip.open(path, "rb") as lines:
        try:
            for line in lines:
                yield parse(line)
                line_number += 1
        except (ValueError, OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path}, line {line_number}: {error}") from error


def _review(line: bytes) -> tuple[str, str, int]:
    """User, item and time."""
    review = parsed(line)
    user, item, time = (review.get(field) for field in ("reviewerID", "asin", "unixReviewTime"))
    if not (isinstance(user, str) and isinstance(item, str) and type(time) is int and abs(time) < 2**63):
        raise ValueError("reviewerID and asin must be strings and unixReviewTime a whole number within 64 bits")
    return user, item, time


def _with_metadata(
    name: str, interactions: Interactions, item_keys: list[str], user_keys: list[str], path: Path
) -> Corpus:
    described = _read_metadata(path, set(item_keys))
    metadata = [described.get(key, (UNKNOWN, [])) for key in item_keys]
    texts, categories = (list(values) for values in zip(*metadata, strict=True))
    return Corpus.build(name, interactions, item_keys, user_keys, texts, categories)


def describe(item: dict) -> tuple[str, list[str]]:
    """The text and the distinct category names of one metadata record.

    {'title': 'Conditioner', 'brand': 'Aveda', 'categories': [['Beauty', 'Hair Care']], 'price': 9.99} becomes
    "Conditioner. Brand: Aveda. Categories: Beauty > Hair Care. Price: $9.99."; what is missing is left out. ValueError
    where a field has another type than this.
    """
    for field, kinds in (("title", str), ("brand", str), ("categories", list), ("price", (int, float))):
        value = item.get(field)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)):
            raise ValueError(f"{field} has the unexpected value {value!r}")
    groups = item.get("categories") or []
    if not all(isinstance(group, list) and all(isinstance(name, str) for name in group) for group in groups):
        raise ValueError(f"categories must be a list of lists of names, not {groups!r}")
    paths = [[entry for entry in map(_clean, group) if entry] for group in groups]
    parts = {
        "": _clean(item.get("title") or ""),
        "Brand: ": _clean(item.get("brand") or ""),
        "Categories: ": "; ".join(dict.fromkeys(" > ".join(path) for path in paths if path)),
        "Price: ": f"${item['price']:.2f}" if item.get("price") is not None else "",
    }
    text = " ".join(label + part + "." * (part[-1] not in ".!?") for label, part in parts.items() if part)
    return text or UNKNOWN, list(dict.fromkeys(entry for path in paths for entry in path))


def _clean(text: str) -> str:
    """HTML entities resolved, every run of white space one blank."""
    return " ".join(html.unescape(text).split())


def _read_datamaps(path: Path) -> dict[str, dict[str, int]]:
    """user2id and item2id: raw id -> number from 0, in the order of the numbers."""
    try:
        maps = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: the bytes are not UTF-8 ({error.reason})") from error
    numbers = {}
    for field in ("user2id", "item2id"):
        entries = maps.get(field) if isinstance(maps, dict) else None
        rule = f"{path}, line 1: {field!r} must map raw ids to the numbers 1, 2, .. as strings"
        if not isinstance(entries, dict) or not all(isinstance(number, str) for number in entries.values()):
            raise ValueError(rule)
        keys = {number: key for key, number in entries.items()}
        missing = [number for number in range(1, len(entries) + 1) if str(number) not in keys]
        if missing or not entries:
            raise ValueError(f"{rule}; of its {len(entries)} numbers, {missing[:1]} is missing")
        numbers[field] = {keys[str(number)]: number - 1 for number in range(1, len(entries) + 1)}
    return numbers


def _read_sequences(path: Path, numbers: dict[str, dict[str, int]]) -> tuple[list[int], list[list[int]]]:
    """Users in file order, and the items of each, both counted from 0."""
    n_users, n_items = len(numbers["user2id"]), len(numbers["item2id"])
    rows: dict[int, list[int]] = {}
    with open(path, "rb") as lines:
        for line_number, line in enumerate(lines, start=1):
            try:
                user, *items = [int(field) - 1 for field in line.split()] or [-1]
                if not 0 <= user < n_users:
                    raise ValueError(f"a line starts with a user, 1 to {n_users} as in datamaps.json")
                if user in rows:
                    raise ValueError(f"user {user + 1} has a line already")
                if not items:
                    raise ValueError(f"user {user + 1} has no items")
                wrong = [item + 1 for item in items if not 0 <= item < n_items]
                if wrong:
                    raise ValueError(f"item {wrong[0]} is not one of 1 to {n_items} as in datamaps.json")
            except ValueError as error:
                raise ValueError(f"{path}, line {line_number}: {error}") from error
            rows[user] = items
    if len(rows) != n_users:
        raise ValueError(f"{path}, line {len(rows) + 1}: the file ends after {len(rows)} of {n_users} users")
    return list(rows), list(rows.values())


def _read_metadata(path: Path, wanted: set[str]) -> dict[str, tuple[str, list[str]]]:
    """asin -> text and categories, of the wanted items; every line of the file is checked."""
    described: dict[str, tuple[str, list[str]]] = {}

    def add(line: bytes) -> None:
        item = _literal(line)
        text, categories = describe(item)
        if item["asin"] in described:
            raise ValueError(f"item {item['asin']!r} has a line already")
        if item["asin"] in wanted:
            text.encode()  # raises where the text holds half a surrogate pair
            described[item["asin"]] = (text, categories)

    count = sum(1 for _ in _parsed(path, add))
    if not described:
        raise ValueError(f"{path}, line {count + 1}: the file ends, and describes no item of the data set")
    return described


def _literal(line: bytes) -> dict:
    """The Python dict with an "asin" on a line; ValueError where there is none."""
    try:
        item = ast.literal_eval(line.decode("utf-8"))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"not a Python dict literal ({error})") from error
    if not isinstance(item, dict) or not isinstance(item.get("asin"), str):
        raise ValueError("not a Python dict literal with an 'asin'")
    return item
