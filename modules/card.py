"""Cards of tokenizers and pipelines: README.md as the Hugging Face Hub shows it."""

import json
import re
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from modules.pretrained import PLACE

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

MOVIELENS = {  # corpus -> name, and where GroupLens' terms are
    "sample": ("MovieLens latest-small", "ml-latest-small-README.html"),
    "ml1m": ("MovieLens 1M", "ml-1m-README.txt"),
    "ml32m": ("MovieLens 32M", "ml-32m-README.html"),
}
ORIGIN = re.compile(r"(?:https?://(?:[^@/]*@)?|(?:ssh://)?git@)([\w.-]+)[:/](.+?)(?:\.git)?/?")

MODEL = f"""```python
from modules.rqvae import RqVae

model = RqVae.from_pretrained("{PLACE}")
codes = model.codes(features)  # [N, {{input_dim}}] float32 -> [N, {{n_layers}}] int64
```"""

TOKENIZER = f"""```python
from modules.tokenizer.tokenizer import Tokenizer

tokenizer = Tokenizer.from_pretrained("{PLACE}")
codes = tokenizer.encode([{{{{"key": "my item", "text": "Its title and description"}}}}])  # [1, {{n_layers}}] int64
```"""

STATISTICS = """`unique_share`, `largest_group` and the losses are by the nearest codes, `id_*` and `neighbours_*` by
the IDs, in which items with the same nearest codes were given different last codes if `separate_collisions` is on."""

FILES = """`semantic_ids.safetensors` holds the IDs of the dataset's items (`SemanticIds.load`), `features.npy` the
features that describe the items, as the encoder sees them (`load_item_features`). Features made of interactions are
not in it; if there are no others, there is no such file. `sources.json` and `sources.safetensors` hold what makes the
features of any item."""

PIPELINE = f"""```python
from modules.serving.recommender import Recommender

recommender = Recommender.from_pretrained("{PLACE}")
[found] = recommender.recommend([{{history}}], k=5)
for item in found.items:
    print(item.key, item.title, item.score)
```

For files of histories: `python recommend.py {PLACE} --histories histories.csv --out recommendations.csv`"""


def tokenizer_card(
    config: dict, corpus_name: str | None = None, n_items: int = 0, features: str = "", statistics: dict | None = None
) -> str:
    """config: arguments of `RqVae`. corpus_name, n_items, features: what it was trained on, if that is known.
    statistics: figures to show, by name."""
    lines = ["Gives items semantic IDs: {n_layers} codes, each one of {codebook_size}.".format(**config), ""]
    lines += [f"- Dataset: {corpus_name} ({n_items:,} items)", f"- Item features: {features}", ""] * bool(corpus_name)
    lines += [_code(), "", (TOKENIZER if corpus_name else MODEL).format(**config), ""]
    lines += [FILES, ""] * bool(corpus_name)
    if statistics:
        lines += ["## Statistics", STATISTICS, "", "| | |", "|---|---|"]
        for name, value in statistics.items():
            lines.append(f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |")
        lines.append("")
    lines += ["## Config", "```json", json.dumps(config, indent=2), "```"]
    return _card("RQ-VAE tokenizer", corpus_name, lines)


def pipeline_card(
    corpus_name: str,
    item_keys: list[str],
    counts: Tensor,
    split: str = "",
    excluded: bool = False,
    metrics: dict[str, float] | None = None,
) -> str:
    """counts: [N] integers, how often each item occurs in training. split: by name. excluded: whether the model was
    chosen, and is shown, by rankings without consumed items. metrics: what metrics.json holds; None for a catalogue
    that has changed since, of which it says nothing."""
    from huggingface_hub import EvalResult

    kind = "new" if excluded else "all"
    dataset, _ = MOVIELENS.get(corpus_name, (corpus_name, ""))
    protocol = f"{split} split, ranking {'items not yet consumed' if excluded else 'all items'}"
    metrics = metrics or {}
    names = [name[5:] for name in metrics if re.fullmatch(r"test/(recall|ndcg)@(5|10)", name)]
    results = [
        EvalResult(
            "sequential-recommendation",
            dataset_type=corpus_name,
            dataset_name=dataset,
            dataset_config=protocol,
            dataset_split="test",
            metric_type=name,
            metric_value=round(metrics[f"test/{name}"], 4),
        )
        for name in names
    ]
    rows = {"most popular": f"test/most_popular/{kind}/", "transition": f"test/transition/{kind}/", "this": "test/"}
    best = [item_keys[item] for item in counts.topk(min(2, len(item_keys))).indices]
    lines = [f"Recommends the next of {len(item_keys):,} items of {dataset} by generating its semantic ID.", ""]
    lines += ["Keys, titles and what was learned from histories are under the terms of the dataset.", ""]
    lines += [_code(), "", PIPELINE.format(history=json.dumps(best, ensure_ascii=False)), ""]
    if metrics:
        lines += [f"## Metrics\nTest, {protocol}.\n", f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for row, start in rows.items() if metrics else ():
        lines.append(f"| {row} | {' | '.join(f'{metrics[start + name]:.4f}' for name in names)} |")
    return _card("Generative retrieval with semantic IDs", corpus_name, lines, results)


def _card(title: str, corpus_name: str | None, lines: list[str], results: "list[EvalResult] | None" = None) -> str:
    from huggingface_hub import ModelCard, ModelCardData

    terms: dict[str, Any] = {"license": "unknown", "datasets": [corpus_name] if corpus_name else None}
    if corpus_name in MOVIELENS:
        file = MOVIELENS[corpus_name][1]
        link = f"https://files.grouplens.org/datasets/movielens/{file}"
        terms = {"license": "other", "license_name": "grouplens", "license_link": link}
        terms["datasets"] = [file.partition("-README")[0]]  # as GroupLens calls it
    data = ModelCardData(
        **terms,
        library_name="generative-retrieval",
        tags=["recommendation", "generative-retrieval", "semantic-ids"],
        model_name=PLACE if results else None,
        eval_results=results or None,
    )
    return str(ModelCard("\n".join(["---", data.to_yaml(), "---", "", f"# {title}", "", *lines, ""])))


def _code() -> str:
    """Where the code is that the card's lines run in: the origin of this clone, without a login in its address."""
    try:
        command = ["git", "remote", "get-url", "origin"]
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        found = ORIGIN.fullmatch(done.stdout.strip())
    except OSError:  # no git here
        found = None
    where = f"the code, [{found[2]}](https://{found[1]}/{found[2]})" if found else "the code that wrote this"
    return f"In a folder with {where}:"
