"""Tokenizers in the original project's formats, against its formulas in numpy."""

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modules.quantize import QuantizeForwardMode, QuantizeMode
from modules.rqvae import RqVae

CONFIG = dict(
    input_dim=9,
    embed_dim=4,
    hidden_dims=[16, 12],
    codebook_size=5,
    codebook_kmeans_init=True,
    codebook_normalize=False,
    codebook_sim_vq=False,
    n_layers=3,
    commitment_weight=0.25,
    n_cat_features=2,
)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_weights(config: dict) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    dims, weights = [config["input_dim"], *config["hidden_dims"], config["embed_dim"]], {}
    for name, sizes in (("encoder", dims), ("decoder", dims[::-1])):
        for n, (low, high) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            weights[f"{name}.mlp.{2 * n}.weight"] = torch.randn(high, low, generator=generator)
    for n in range(config["n_layers"]):
        weights[f"layers.{n}.embedding.weight"] = torch.randn(5, 4, generator=generator)
        if config["codebook_sim_vq"]:
            weights[f"layers.{n}.out_proj.0.weight"] = torch.randn(4, 4, generator=generator)
    return weights


def expected(config: dict, weights: dict, activation: str, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [B, L] and decoded vectors, by the original's formulas."""
    act = {"relu": lambda v: np.maximum(v, 0), "silu": lambda v: v / (1 + np.exp(-v))}[activation]
    w = {name: tensor.double().numpy() for name, tensor in weights.items()}

    def mlp(name: str, rows: np.ndarray) -> np.ndarray:
        for n in range(3):
            rows = rows @ w[f"{name}.mlp.{2 * n}.weight"].T
            rows = act(rows) if n < 2 else rows
        return rows

    left = mlp("encoder", x)
    left = unit(left) if config["codebook_normalize"] else left
    total, codes = 0, []
    for n in range(config["n_layers"]):
        codebook = w[f"layers.{n}.embedding.weight"]
        codebook = codebook @ w[f"layers.{n}.out_proj.0.weight"].T if config["codebook_sim_vq"] else codebook
        codebook = unit(codebook) if config["codebook_normalize"] and n == 0 else codebook
        codes.append(((left[:, None] - codebook) ** 2).sum(-1).argmin(1))
        left, total = left - codebook[codes[-1]], total + codebook[codes[-1]]
    decoded = mlp("decoder", total)
    return np.stack(codes, 1), unit(decoded) if activation == "silu" else decoded


def write_hub(folder, config: dict, weights: dict):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return folder


def write_pt(folder, config: dict, weights: dict, **more):
    model_config = {**config, "codebook_mode": QuantizeForwardMode.STE}
    torch.save({"iter": 149, "model": weights, "model_config": model_config, "optimizer": {}, **more}, folder / "x.pt")
    return folder / "x.pt"


@pytest.mark.parametrize("write", [write_hub, write_pt])
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("changed", [{}, {"codebook_sim_vq": True, "codebook_normalize": True}])
def test_codes_and_decoded_vectors_are_the_originals(tmp_path, write, activation, changed):
    config = CONFIG | changed
    weights, x = make_weights(config), np.random.default_rng(1).normal(size=(64, 9)).astype(np.float32)
    codes, decoded = expected(config, weights, activation, x.astype(np.float64))
    model = RqVae.from_pretrained(
        write(tmp_path / "old" if write is write_hub else tmp_path, config, weights), activation
    )
    model.save_pretrained(tmp_path / "new")
    for loaded in (model, RqVae.from_pretrained(tmp_path / "new")):
        with torch.no_grad():
            out = loaded.get_semantic_ids(torch.from_numpy(x))
            assert out.sem_ids.tolist() == loaded.codes(torch.from_numpy(x)).tolist() == codes.tolist()
            np.testing.assert_allclose(loaded.decode(out.embeddings.sum(-1)), decoded, rtol=1e-5, atol=1e-5)
        assert out.embeddings.shape == out.residuals.shape == (64, 4, 3)
    mode = QuantizeMode.STE if write is write_pt else QuantizeMode.ROTATION_TRICK  # the Hub's config stores none
    assert model.layers[0].mode is mode
    with pytest.raises(ValueError, match="was trained with"):
        RqVae.from_pretrained(tmp_path / "new", {"relu": "silu", "silu": "relu"}[activation])


def test_an_activation_that_nobody_gave_is_told(tmp_path, caplog):
    folder = write_hub(tmp_path / "old", CONFIG, make_weights(CONFIG))
    assert RqVae.from_pretrained(folder).config["activation"] == "silu"
    assert caplog.messages[0].endswith('load it with activation="relu".') and "taking 'silu'" in caplog.text
    caplog.clear()
    RqVae.from_pretrained(folder, "silu")
    assert not caplog.messages


RAN = []


def note(word: str) -> None:
    RAN.append(word)


class Payload:
    def __reduce__(self):
        return note, ("run",)


def test_pickled_code_runs_only_by_request(tmp_path):
    path = write_pt(tmp_path, CONFIG, make_weights(CONFIG), extra=Payload())
    with pytest.raises(ValueError, match="allow_pickle=True"):
        RqVae.from_pretrained(path, "silu")
    assert RAN == []
    RqVae.from_pretrained(path, "silu", allow_pickle=True)
    assert RAN == ["run"]


def write_old_format(path):
    torch.save({"model": {}}, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-500]),
        lambda path: path.write_bytes(pickle.dumps(Payload())),
        lambda path: torch.save({"model": {}}, path),
        lambda path: torch.save([1, 2], path),
        write_old_format,
    ],
)
def test_what_is_no_checkpoint_is_named(tmp_path, write):
    path = write_pt(tmp_path, CONFIG, make_weights(CONFIG))
    write(path)
    RAN.clear()
    with pytest.raises(ValueError, match=str(path)):
        RqVae.from_pretrained(path, "silu")
    assert RAN == []


def test_weights_that_do_not_fit_the_config_are_refused(tmp_path):
    folder = write_hub(tmp_path / "old", CONFIG | {"n_layers": 4}, make_weights(CONFIG))
    with pytest.raises(ValueError, match="do not make a tokenizer"):
        RqVae.from_pretrained(folder, "silu")
