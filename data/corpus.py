"""A data set as every later step sees it: described items, and who consumed them in which order."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from common.files import folder_aside, write_tensors
from common.packed_strings import pack_lists, pack_strings, unpack_lists, unpack_strings
from common.schemas import Interactions
from data.splits import Splits
from data.tags import Tags

FORMAT_VERSION = 2
TEXTS = "texts.safetensors"
DESCRIBED = ("texts.bytes", "texts.offsets", "categories.bytes", "categories.offsets", "categories.lengths")
MAX_TITLE = 100  # characters
COUNTS = ("n_users", "n_items", "n_interactions")
HEADER_FIELDS = {"format_version", "name", "hash", "text_hash", "raw_files", *COUNTS}
Strings = TypeVar("Strings", list[str], list[list[str]])
REBUILD = "rebuild it with `train.force_dataset_process=True`, or delete the folder"


class Corpus:
    """Items, users and interactions of one data set. Make one with `Corpus.build` or `Corpus.load`.

    name: "sample", "amazon_beauty": also the name of its cache folder.
    interactions: items [T] int32, offsets [U+1] int64, timestamps [T] int64 or None.
    item_keys: [N] raw item ids; row n is item id n.
    user_keys: [U] raw user ids.
    hash: 16 hex digits over keys, texts, categories and interactions: equal exactly if the data are.
    text_hash: 16 hex digits over the item texts in order.
    """

    def __init__(
        self,
        name: str,
        interactions: Interactions,
        item_keys: list[str],
        user_keys: list[str],
        hash: str,
        text_hash: str,
        described: tuple[list[str], list[list[str]]] | Path,
        tags: Tags | None = None,
    ) -> None:
        """described: texts and categories, or the file they are read from when they are asked for. Raises ValueError
        where keys and interactions contradict each other; see `_validate`."""
        _validate(name, interactions, item_keys, user_keys)
        self.name, self.interactions, self.hash, self.text_hash = name, interactions, hash, text_hash
        self.item_keys, self.user_keys, self._given = item_keys, user_keys, described
        self._tags, self._cached_hash = tags, text_hash  # without the tags
        self._tagged: list[str] | None = None

    @property
    def n_items(self) -> int:
        return len(self.item_keys)

    @property
    def n_users(self) -> int:
        return len(self.user_keys)

    @cached_property
    def _texts(self) -> list[str]:
        return self._given[0] if isinstance(self._given, tuple) else self._read(self._given, unpack_strings, slice(2))

    @cached_property
    def _categories(self) -> list[list[str]]:
        return self._given[1] if isinstance(self._given, tuple) else self._read(self._given, unpack_lists, slice(2, 5))

    def _read(self, path: Path, unpack: Callable[..., Strings], part: slice) -> Strings:
        """Texts or categories. ValueError where the cached file is damaged, or its texts are of another corpus."""
        try:
            tensors = load_file(path)
            packed = [tensors[name] for name in DESCRIBED]
            if _hash(packed[:2]) != self._cached_hash:
                raise ValueError(f"its texts are not those of corpus {self.name!r}")
            return unpack(*packed[part])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(f"{path} can't be used ({error}): {REBUILD}") from error

    def texts(self) -> list[str]:
        """[N] descriptions, one per item, in the order of the item ids; without tags before `apply_split`."""
        return self._tagged or self._texts

    def categories(self) -> list[list[str]]:
        """[N] lists of names, in the order of the item ids."""
        return self._categories

    def titles(self) -> list[str]:
        """[N] short names for people, what stands first in the texts."""
        return [title(text) for text in self.texts()]

    def columns(self, names: Sequence[str]) -> dict[str, list[list[str]]]:
        """What is known of the items, of each a list of texts: "key", "text", "categories". ValueError otherwise."""
        every = {
            "key": lambda: [[key] for key in self.item_keys],
            "text": lambda: [[text] for text in self.texts()],
            "categories": self.categories,
        }
        for name in names:
            if name not in every:
                raise ValueError(f"train.item_columns names {name!r}; the items of a corpus have {', '.join(every)}.")
        return {name: every[name]() for name in names}

    def apply_split(self, splits: Splits) -> None:
        """Makes it a corpus to train on: interactions in the split's order, texts with the tags that training knows."""
        self.interactions = splits.interactions
        if self._tags is not None:
            self._tagged = self._tags.append(self._texts, self._tags.known(splits, self.n_items))
            self.text_hash = _hash([*pack_strings(self._tagged)])

    @staticmethod
    def build(
        name: str,
        interactions: Interactions,
        item_keys: list[str],
        user_keys: list[str],
        texts: list[str],
        categories: list[list[str]],
        tags: Tags | None = None,
    ) -> "Corpus":
        """A corpus from its parts; texts, which lack the tags, and categories are [N], in the order of `item_keys`.
        Raises ValueError where lengths, ids, offsets or keys contradict each other."""
        for field, values in (("texts", texts), ("categories", categories)):
            if len(values) != len(item_keys):
                raise ValueError(f"corpus {name!r}: {len(values)} {field} for {len(item_keys)} item keys")
        packed_texts = pack_strings(texts)
        content = [*pack_strings(item_keys), *pack_strings(user_keys), *packed_texts, *pack_lists(categories)]
        content += [interactions.items, interactions.offsets]
        content += [interactions.timestamps] if interactions.timestamps is not None else []
        content += tags.tensors().values() if tags else []
        hashes = _hash(content), _hash([*packed_texts])
        return Corpus(name, interactions, item_keys, user_keys, *hashes, (texts, categories), tags)

    def save(self, folder: str | Path, raw_files: Sequence[dict] = (), options: dict | None = None) -> None:
        """Writes corpus.json, interactions with keys, and texts with categories aside, then replaces `folder` by them.

        raw_files: fingerprints of the files it was built from; options: how they were read. Both go into corpus.json.
        """
        header = {"format_version": FORMAT_VERSION, "name": self.name, "hash": self.hash, "text_hash": self.text_hash}
        header |= zip(COUNTS, (self.n_users, self.n_items, len(self.interactions)), strict=True)
        header |= {"raw_files": list(raw_files), "options": options or {}}
        with folder_aside(Path(folder)) as part:
            write_tensors(part / "tensors.safetensors", self._tensors())
            packed = zip(DESCRIBED, (*pack_strings(self.texts()), *pack_lists(self.categories())), strict=True)
            write_tensors(part / TEXTS, dict(packed))
            (part / "corpus.json").write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"items": self.interactions.items, "offsets": self.interactions.offsets}
        if self.interactions.timestamps is not None:
            tensors["timestamps"] = self.interactions.timestamps
        for field in ("item_keys", "user_keys"):
            tensors[f"{field}.bytes"], tensors[f"{field}.offsets"] = pack_strings(getattr(self, field))
        return tensors | (self._tags.tensors() if self._tags else {})

    @staticmethod
    def load(folder: str | Path) -> "Corpus":
        """Reads what `save` wrote; the texts and categories only once they are asked for. Raises FileNotFoundError
        where there is no such folder, and ValueError that names the folder and the fix where the cache is damaged or of
        another format version."""
        folder = Path(folder)
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no cached corpus at {folder}")
        header = read_header(folder)
        try:
            tensors = load_file(folder / "tensors.safetensors")
            interactions = Interactions(tensors["items"], tensors["offsets"], tensors.get("timestamps"))
            keys = {
                field: unpack_strings(tensors[f"{field}.bytes"], tensors[f"{field}.offsets"])
                for field in ("item_keys", "user_keys")
            }
            counts = (len(keys["user_keys"]), len(keys["item_keys"]), len(interactions))
            if counts != (recorded := tuple(header[field] for field in COUNTS)):
                raise ValueError(f"{', '.join(COUNTS)} are {counts}, corpus.json says {recorded}")
            if not (folder / TEXTS).is_file():
                raise ValueError(f"{TEXTS} is missing")
            given = header["name"], interactions, keys["item_keys"], keys["user_keys"], header["hash"]
            return Corpus(*given, header["text_hash"], folder / TEXTS, Tags.of(tensors))
        except Exception as error:  # whatever a damaged file makes a reader raise
            raise ValueError(f"the cached corpus in {folder} can't be used ({error}): {REBUILD}") from error


def title(text: str) -> str:
    """What stands before the first labelled part, such as "Genres: ..", cut to 100 characters."""
    first = re.split(r"\. (?=[A-Z]\w*: )", text.strip().partition("\n")[0])[0].removesuffix(".")
    return first if len(first) <= MAX_TITLE else first[: MAX_TITLE - 1].rstrip() + "…"


def read_header(folder: Path) -> dict:
    """corpus.json of a cached corpus. Raises ValueError where it is damaged or of another format version."""
    try:
        header = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
        if header["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {header['format_version']}, this code reads {FORMAT_VERSION}")
        if missing := HEADER_FIELDS - header.keys():
            raise ValueError(f"no {', '.join(sorted(missing))}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'corpus.json'} can't be used ({error!r}): {REBUILD}") from error
    return header


def _validate(name: str, interactions: Interactions, item_keys: list[str], user_keys: list[str]) -> None:
    """Raises ValueError unless ids, offsets, times and keys fit together."""
    items, offsets, timestamps = interactions.items, interactions.offsets, interactions.timestamps

    def require(rule: bool, message: str) -> None:
        if not rule:
            raise ValueError(f"corpus {name!r}: {message}")

    require(items.dtype == torch.int32 and items.ndim == 1, f"items must be [T] int32, not {items.dtype}")
    fits = offsets.dtype == torch.int64 and offsets.shape == (len(user_keys) + 1,)
    require(fits, f"offsets must be [{len(user_keys) + 1}] int64, not {list(offsets.shape)} {offsets.dtype}")
    require(len(item_keys) > 0 and len(user_keys) > 0, "needs at least one item and one user")
    for field, keys in (("item_keys", item_keys), ("user_keys", user_keys)):
        n_distinct = len(set(keys))
        require(n_distinct == len(keys), f"{field} must be unique, {n_distinct} of {len(keys)} are")
    lengths = offsets.diff()
    rises = int(offsets[0]) == 0 and int(offsets[-1]) == len(items) and bool((lengths >= 0).all())
    require(rises, f"offsets must rise from 0 to {len(items)}")
    first = user_keys[int(lengths.argmin())]
    require(int(lengths.min()) > 0, f"user {first!r} has no interactions; leave such users out")
    low, high, last = int(items.min()), int(items.max()), len(item_keys) - 1
    require(0 <= low and high <= last, f"item ids must be within 0 to {last}, not {low} to {high}")
    if timestamps is not None:
        fits = timestamps.dtype == torch.int64 and timestamps.shape == items.shape
        require(fits, f"timestamps must be [{len(items)}] int64, not {timestamps.shape} {timestamps.dtype}")
        back = timestamps.diff() < 0
        back[offsets[1:-1] - 1] = False  # the step from one user to the next
        require(not bool(back.any()), "timestamps must not fall within a user")


def _hash(tensors: list[Tensor]) -> str:
    """16 hex digits over the contents of CPU tensors and their lengths."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(len(tensor).to_bytes(8, "little"))
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()[:16]
