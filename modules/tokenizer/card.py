"""The card of a tokenizer: README.md as the Hugging Face Hub shows it."""

import json

MODEL = """```python
from modules.rqvae import RqVae

model = RqVae.from_pretrained("<this repository or folder>")
codes = model.codes(features)  # [N, {input_dim}] float32 -> [N, {n_layers}] int64
```"""

TOKENIZER = """```python
from modules.tokenizer.tokenizer import Tokenizer

tokenizer = Tokenizer.from_pretrained("<this repository or folder>")
codes = tokenizer.encode([{{"key": "my item", "text": "Its title and description"}}])  # [1, {n_layers}] int64
```"""

STATISTICS = """`unique_share`, `largest_group` and the losses are by the nearest codes, `id_*` and `neighbours_*` by
the IDs, in which items with the same nearest codes were given different last codes if `separate_collisions` is on."""

FILES = """`semantic_ids.safetensors` holds the IDs of the dataset's items (`SemanticIds.load`), `features.npy` the
features that describe the items, as the encoder sees them (`load_item_features`). Features made of interactions are
not in it; if there are no others, there is no such file. `sources.json` and `sources.safetensors` hold what makes the
features of any item."""


def model_card(
    config: dict, dataset: str | None = None, features: str | None = None, statistics: dict[str, float] | None = None
) -> str:
    """config: arguments of `RqVae`. dataset, features: what it was trained on. statistics: figures to show, by name."""
    lines = [
        "---",
        "tags:",
        "- rq-vae",
        "- semantic-ids",
        "- generative-retrieval",
        "---",
        "",
        "# RQ-VAE tokenizer",
        "",
    ]
    lines += ["Gives items semantic IDs: {n_layers} codes, each one of {codebook_size}.".format(**config), ""]
    lines += [f"- Dataset: {dataset or 'not recorded'}", f"- Item features: {features or 'not recorded'}", ""]
    lines += [(TOKENIZER if dataset else MODEL).format(**config), ""]
    if dataset is not None:
        lines += [FILES, ""]
    if statistics:
        lines += ["## Statistics", STATISTICS, "", "| | |", "|---|---|"]
        for name, value in statistics.items():
            lines.append(f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |")
        lines.append("")
    lines += ["## Config", "```json", json.dumps(config, indent=2), "```", ""]
    return "\n".join(lines)
