"""What is released: complete, small, and what its cards say."""

from pathlib import Path

import torch

from modules.rqvae import RqVae
from modules.serving.recommender import Recommender
from modules.tokenizer.semids import SemanticIds

RELEASED = Path(__file__).parents[1] / "trained_models"


def test_the_released_tokenizer_is_usable():
    folder = RELEASED / "rqvae_amazon_beauty"
    model, ids = RqVae.from_pretrained(folder), SemanticIds.load(folder)
    assert len(ids.codes.unique(dim=0)) == ids.n_items == 12101
    assert ids.level_sizes == (model.config["codebook_size"],) * model.config["n_layers"]
    assert all(len(level.unique()) == model.config["codebook_size"] for level in ids.codes.T)
    out = model.get_semantic_ids(torch.randn(3, model.config["input_dim"]))
    assert model.decode(out.embeddings.sum(-1)).shape == (3, model.config["input_dim"])
    card = (folder / "README.md").read_text()
    assert ids.corpus_name in card and "all-MiniLM-L6-v2" in card


def test_the_released_pipeline_recommends_a_trilogys_last_part():
    folder = RELEASED / "decoder_sample"
    recommender = Recommender.from_pretrained(folder)
    [found] = recommender.recommend([["260", "1196"]], k=3)
    assert "Return of the Jedi" in " ".join(item.title for item in found.items)
    assert "redistribute the data set" in (folder / "GROUPLENS.txt").read_text()
    assert sum(file.stat().st_size for file in RELEASED.rglob("*") if file.is_file()) < 15e6
