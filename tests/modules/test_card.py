"""Cards as the Hub's client reads them."""

import subprocess

import pytest
from huggingface_hub import ModelCard

from modules import card
from modules.rqvae import RqVae


@pytest.fixture
def config():
    return RqVae(6, embed_dim=3, hidden_dims=(5,), codebook_size=4).config


def test_a_data_sets_terms_are_the_licence(config):
    data = ModelCard(card.tokenizer_card(config, "sample", 9742, "tfidf-svd", {"unique_share": 0.61362})).data
    assert (data.license, data.license_name) == ("other", "grouplens")
    assert data.license_link.endswith("/ml-latest-small-README.html") and data.datasets == ["ml-latest-small"]
    assert ModelCard(card.tokenizer_card(config, "amazon_beauty", 3)).data.datasets == ["amazon_beauty"]
    own = ModelCard(card.tokenizer_card(config))
    assert (
        own.data.license == "unknown"
        and own.data.eval_results is None
        and own.data.datasets is None
        and "RqVae.from_pretrained" in own.text
    )


@pytest.mark.parametrize(
    ("origin", "address"),
    [
        ("https://github.com/someone/shop.git", "https://github.com/someone/shop"),
        ("https://someone:secret@git.example.org/group/shop/", "https://git.example.org/group/shop"),
        ("git@github.com:someone/shop.git", "https://github.com/someone/shop"),
        ("ssh://git@github.com/someone/shop", "https://github.com/someone/shop"),
        ("/srv/my.git/shop", None),
        (None, None),
    ],
)
def test_the_code_is_linked_without_a_login(config, tmp_path, monkeypatch, origin, address):
    monkeypatch.setattr(card, "__file__", str(tmp_path / "card.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    if origin:
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        subprocess.run(["git", "-C", tmp_path, "remote", "add", "origin", origin], check=True)
    text = ModelCard(card.tokenizer_card(config)).text
    assert (f"]({address})" in text) if address else ("](" not in text)
    assert "secret" not in text
