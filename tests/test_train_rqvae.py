import json

import numpy as np
import pytest
import torch

from data.processed import RecDataset, load_corpus
from modules.rqvae import RqVae
from modules.tokenizer.semids import SemanticIds
from tests.pipeline import launch, lines, run, write_raw


def test_the_run_folder_keeps_the_contract(trained):
    root = trained / "out" / "rqvae"
    assert {path.name for path in root.iterdir()} == {
        "config.gin",
        "metrics.jsonl",
        "metrics.json",
        "checkpoints",
        "plots",
        "tokenizer",
    }
    files = {path.name for path in (root / "tokenizer").iterdir()}
    assert files == {"config.json", "model.safetensors", "semantic_ids.safetensors"}
    assert {path.name for path in (root / "plots").iterdir()} == {"losses.png", "usage.png"}
    assert (root / "checkpoints" / "LAST").read_text().strip() == "step_00000060"
    assert "RqVae.codebook_size = 6" in (root / "config.gin").read_text()
    metrics = json.loads((root / "metrics.json").read_text())
    assert metrics["usage_1"] == metrics["usage_2"] == 1.0
    assert metrics["loss"] == pytest.approx(metrics["reconstruction_loss"] + metrics["quantize_loss"])
    losses = [row["loss"] for row in lines(root / "metrics.jsonl") if row["split"] == "train"]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_semantic_ids_are_the_models_codes_and_unique(trained):
    semantic_ids = SemanticIds.load(trained / "out" / "rqvae")
    model = RqVae.from_pretrained(trained / "out" / "rqvae" / "tokenizer")
    features = [path for path in (trained / "features" / "amazon_beauty").iterdir() if path.suffix == ".npy"]
    assert len(features) == 1
    x = torch.from_numpy(np.load(features[0]))
    assert torch.equal(model.codes(x), semantic_ids.codes[:, :-1])
    assert len(set(map(tuple, semantic_ids.codes.tolist()))) == semantic_ids.n_items == 30
    corpus = load_corpus(RecDataset.AMAZON, str(trained), "beauty")
    assert semantic_ids.item_keys == corpus.item_keys
    semantic_ids.check_corpus(corpus.name, corpus.hash)


@pytest.mark.parametrize("mode", ["STE", "ROTATION_TRICK", "GUMBEL_SOFTMAX"])
def test_every_mode_trains_and_leaves_no_code_unused(trained, tmp_path, mode):
    metrics = run(
        trained,
        "rqvae",
        f"RqVae.codebook_mode = %modules.quantize.QuantizeMode.{mode}",
        f'train.save_dir_root = "{tmp_path}"',
    )
    losses = [row["loss"] for row in lines(tmp_path / "metrics.jsonl") if row["split"] == "train"]
    assert losses[-1] < losses[0]
    assert metrics["usage_1"] == 1.0


def test_categories_become_trailing_features(trained, tmp_path):
    run(trained, "rqvae", "train.categories = True", f'train.save_dir_root = "{tmp_path}"')
    assert RqVae.from_pretrained(tmp_path / "tokenizer").config["n_cat_features"] == 5


def test_two_processes_give_the_codes_of_one(trained, tmp_path):
    one = run(trained, "rqvae", f'train.save_dir_root = "{tmp_path}/one"')
    two = launch(trained, "rqvae", f'train.save_dir_root = "{tmp_path}/two"')
    assert two == pytest.approx(one, abs=1e-5)
    ids = [SemanticIds.load(tmp_path / name).codes for name in ("one", "two")]
    assert torch.equal(*ids)


def test_two_processes_may_rebuild_the_caches(tmp_path):
    write_raw(tmp_path)
    metrics = launch(tmp_path, "rqvae", "train.force_dataset_process = True", "train.iterations = 5")
    assert metrics["usage_1"] == 1.0
