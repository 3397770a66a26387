"""The released tokenizers: complete, and what their cards say."""

from pathlib import Path

import pytest
import torch

from modules.rqvae import RqVae
from modules.tokenizer.semids import SemanticIds

FOLDERS = [path for path in (Path(__file__).parents[1] / "trained_models").iterdir() if path.is_dir()]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_released_tokenizer_is_usable(folder):
    model, ids = RqVae.from_pretrained(folder), SemanticIds.load(folder)
    assert len(ids.codes.unique(dim=0)) == ids.n_items == 12101
    assert ids.level_sizes == (model.config["codebook_size"],) * model.config["n_layers"]
    assert all(len(level.unique()) == model.config["codebook_size"] for level in ids.codes.T)
    out = model.get_semantic_ids(torch.randn(3, model.config["input_dim"]))
    assert model.decode(out.embeddings.sum(-1)).shape == (3, model.config["input_dim"])
    card = (folder / "README.md").read_text()
    assert ids.corpus_name in card and "all-MiniLM-L6-v2" in card
