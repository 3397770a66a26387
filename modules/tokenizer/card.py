"""The card of a tokenizer: README.md as the Hugging Face Hub shows it."""

import json

USAGE = """```python
from modules.rqvae import RqVae
from modules.tokenizer.semids import SemanticIds

tokenizer = RqVae.from_pretrained("<this repository or folder>")
codes = tokenizer.codes(features)  # [N, {input_dim}] float32 -> [N, {n_layers}] int64
```"""

STATISTICS = """`unique_share`, `largest_group` and the losses are by the nearest codes, `id_*` and `neighbours_*` by
the IDs, in which items with the same nearest codes were given different last codes if `separate_collisions` is on."""

FILES = """`semantic_ids.safetensors` holds the IDs of the dataset's items (`SemanticIds.load`), `features.npy` the
features that describe the items, as the encoder sees them (`load_item_features`). Features made of interactions are
not in it; if there are no others, there is no such file."""


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
    lines += [USAGE.format(**config), ""]
    if dataset is not None:
        lines += [FILES, ""]
    if statistics:
        lines += ["## Statistics", STATISTICS, "", "| | |", "|---|---|"]
        for name, value in statistics.items():
            lines.append(f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |")
        lines.append("")
    lines += ["## Config", "```json", json.dumps(config, indent=2), "```", ""]
    return "\n".join(lines)
