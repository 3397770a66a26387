"""Your own catalogue and interactions: tables in, `Corpus` out."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import gin

from common.parameters import Name, NonNegativeInt, PathName, configurable
from data.corpus import Corpus, read_header
from data.events import factorize, k_core, sequences
from data.tables import ATOMIC, BILLION, fail, keys, read_table, times

if TYPE_CHECKING:
    import polars as pl

UNKNOWN = "Unknown item."
logger = logging.getLogger(__name__)


@configurable
@dataclass(frozen=True)
class CustomData:
    """Where your data lie and what their columns are called. Bind it in gin; paths start at the working directory.

    name: of the corpus, its cache folder and "{corpus}" in train.save_dir_root.
    interactions: a .csv, .tsv, .parquet, .jsonl, .ndjson or .inter file, one interaction per row; or a .json file,
    {user: [item, ...]} in time order. Without it only a corpus that is cached under this name is used.
    items: a file with one item per row, .item instead of .inter, or {item: {column: value, ...}}: the catalogue,
    whether or not an item has interactions; without it the catalogue is what the interactions name.
    user_column, item_column: ids, taken as strings. time_column: whole or decimal numbers, or ISO dates; "" where the
    rows of each user are in time order, as in .json files. item_key_column: the ids in `items`, by default named as in
    the interactions.
    text_columns: of `items`; the first enters the item's text as it is, others with their name before them.
    category_column: of `items`; a list, a token_seq of RecBole's, or names separated by "|".
    k_core: interactions of users or items with fewer are left out, again and again until none is left; 0 keeps all.
    drop_unknown: interactions with items that `items` lacks are left out, not an error.
    drop_duplicates: of rows with equal user, item and time only the first counts.
    What is left out is counted in a line of the log. Stage 2 takes what stage 1 has cached under the name with all its
    parameters; those that are bound besides must be equal.
    """

    name: str = "custom"
    interactions: PathName | None = None
    items: PathName | None = None
    user_column: Name = "user"
    item_column: Name = "item"
    time_column: str = "timestamp"
    item_key_column: Name | None = None
    text_columns: tuple[Name, ...] = ()
    category_column: Name | None = None
    k_core: NonNegativeInt = 0
    drop_unknown: bool = False
    drop_duplicates: bool = True

    def __post_init__(self) -> None:
        usable = self.name.isprintable() and Path(self.name).name == self.name and not self.name.startswith(".")
        if not usable or not 0 < len(self.name.encode()) <= 100:
            raise ValueError(f"CustomData.name = {self.name[:200]!r} must do as a folder's name, of 1 to 100 bytes")

    @staticmethod
    def as_cached(folder: Path) -> "CustomData":
        """What the corpus in this folder was made of. ValueError where gin binds a parameter to something else."""
        given, cached = CustomData(), CustomData(**read_header(folder)["options"])
        for name, value in asdict(cached).items():
            try:
                gin.query_parameter(f"CustomData.{name}")
            except ValueError:  # not bound
                continue
            if getattr(given, name) != value:
                raise ValueError(
                    f"CustomData.{name} = {getattr(given, name)!r}, but the corpus in {folder} was made with "
                    f"{value!r}: leave it out, or bind it as for train_rqvae.py."
                )
        return cached

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(path for path in (self.interactions, self.items) if path)

    @property
    def options(self) -> dict | None:
        """All parameters, as JSON keeps them; None where only a cached corpus is asked for."""
        return json.loads(json.dumps(asdict(self))) if self.interactions else None

    @property
    def timed(self) -> bool:
        """Whether the interactions have times, or only an order."""
        return bool(self.time_column) and not (self.interactions or "").endswith(".json")

    def read(self) -> Corpus:
        """Users come in the order of their first interaction, items in the order of `items`, or of their first
        interaction without it. Ties in time keep the order of the file.

        Raises ValueError that names file and row where an id is missing, unknown or repeated among the items, or a
        time can't be read; FileNotFoundError where a file is missing.
        """
        import polars as pl

        if self.interactions is None:
            raise ValueError(
                f"No cached corpus {self.name!r} is usable, and CustomData.interactions is not bound: run "
                "train_rqvae.py with it first, or bind CustomData here as there."
            )
        path = Path(self.interactions)
        ids = (self.user_column, self.item_column)
        table = read_table(path, [*ids, self.time_column] if self.timed else ids, text=ids)
        stamps = times(path, table, self.time_column) if self.timed else None
        events = pl.DataFrame({name: keys(path, table, own) for name, own in zip(("user", "item"), ids, strict=True)})
        events = events.with_columns(timestamp=pl.lit(None, pl.Int128) if stamps is None else stamps)
        catalogue = self.catalogue()
        events = self._chosen(path, events, catalogue)
        if events.is_empty():
            raise ValueError(f"{path}: no interaction is left of {len(table):,}")
        if catalogue is None:
            nothing = {"text": pl.lit(UNKNOWN), "categories": pl.lit([], pl.List(pl.String))}
            catalogue = events.select(key=pl.col("item").unique(maintain_order=True)).with_columns(**nothing)
        return self._corpus(events, catalogue)

    def _chosen(self, path: Path, events: "pl.DataFrame", catalogue: "pl.DataFrame | None") -> "pl.DataFrame":
        """Without unknown items, duplicates, and what the k-core leaves out; says how many rows are gone."""
        left_out, total = {}, len(events)
        if catalogue is not None:
            known = events["item"].is_in(catalogue["key"].implode())
            if not known.all() and not self.drop_unknown:
                row = int((~known).arg_true()[0])
                problem = f"item {events['item'][row]!r} is not in {self.items}"
                advice = f"CustomData.drop_unknown = True leaves such rows out, {(~known).sum():,} here"
                fail(path, row, f"{problem}; {advice}")
            events = events.filter(known)
            left_out["with items that are not in the catalogue"] = total - len(events)
        if self.drop_duplicates and self.timed:
            before = len(events)
            events = events.unique(["user", "item", "timestamp"], keep="first", maintain_order=True)
            left_out["that repeat another"] = before - len(events)
        if self.k_core > 1:
            before = len(events)
            events = k_core(events, self.k_core)
            left_out[f"outside the {self.k_core}-core"] = before - len(events)
        for why, count in left_out.items():
            if count:
                logger.info(f"{path}: left out {count:,} of {total:,} rows {why}")
        return events

    def catalogue(self) -> "pl.DataFrame | None":
        """key, text, categories of every item."""
        import polars as pl

        if self.items is None:
            if self.text_columns or self.category_column:
                raise ValueError("text_columns and category_column are columns of CustomData.items: bind it too")
            return None
        path, key = Path(self.items), self.item_key_column or self.item_column
        columns = [key, *self.text_columns, *([self.category_column] if self.category_column else [])]
        table = read_table(path, list(dict.fromkeys(columns)), text=(key,))
        for column, kind in table.schema.items():
            if (kind.inner if isinstance(kind, pl.List) else kind).is_nested():
                raise ValueError(f"{path}: {column!r} must hold texts, numbers or lists of them, not {kind}")
        ids = keys(path, table, key)
        if ids.is_empty():
            raise ValueError(f"{path}: there must be an item")
        repeated = ids.is_duplicated()
        if repeated.any():
            row = int((~ids.is_first_distinct()).arg_true()[0])
            fail(path, row, f"item {ids[row]!r} has a row already")
        categories = pl.lit([], pl.List(pl.String))
        if self.category_column:
            categories = _names(table, self.category_column).list.unique(maintain_order=True)
        comma = " " if path.suffix in ATOMIC else ", "  # between the parts of a list
        made = table.select(key=ids, text=_text(table, self.text_columns, comma), categories=categories)
        if self.text_columns and (made["text"] == UNKNOWN).all():
            raise ValueError(f"{path}: the columns {', '.join(self.text_columns)} are empty in all rows")
        return made

    def _corpus(self, events: "pl.DataFrame", catalogue: "pl.DataFrame") -> Corpus:
        import polars as pl

        user_keys, users = factorize(events["user"])
        items = catalogue.select(item="key").with_row_index("number")
        events = events.with_columns(user=users).join(items, on="item", how="left", maintain_order="left")
        whole = (pl.col("timestamp") // BILLION).cast(pl.Int64)  # what is below it has its say in the order
        events = events.sort("timestamp", maintain_order=True).select("user", timestamp=whole, item="number")
        _, interactions = sequences(events)
        item_keys, texts, categories = (catalogue[column].to_list() for column in ("key", "text", "categories"))
        return Corpus.build(self.name, interactions, item_keys, user_keys, texts, categories)


def _text(table: "pl.DataFrame", columns: tuple[str, ...], comma: str) -> "pl.Expr":
    """ "Blue shoe. Brand: Acme." from the columns title and brand; what is empty is left out."""
    import polars as pl

    parts = []
    for number, column in enumerate(columns):
        value = pl.col(column)
        if isinstance(table.schema[column], pl.List):
            value = _names(table, column).list.join(comma)
        value = value.cast(pl.String).str.replace_all(r"\s+", " ").str.strip_chars()
        value = pl.when(value != "").then(value)
        labelled = pl.format(column.capitalize() + ": {}", value) if number else value
        parts.append(pl.when(labelled.str.contains(r"[.!?]$")).then(labelled).otherwise(labelled + "."))
    if not parts:
        return pl.lit(UNKNOWN)
    text = pl.concat_str(parts, separator=" ", ignore_nulls=True)
    return pl.when(text != "").then(text).otherwise(pl.lit(UNKNOWN))


def _names(table: "pl.DataFrame", column: str) -> "pl.Expr":
    import polars as pl

    names = pl.col(column).cast(pl.List(pl.String) if isinstance(table.schema[column], pl.List) else pl.String)
    if not isinstance(table.schema[column], pl.List):
        names = names.str.split("|")
    return (
        names.list.eval(pl.element().str.strip_chars())
        .list.eval(pl.element().filter(pl.element().is_not_null() & (pl.element() != "")))
        .fill_null([])
    )
