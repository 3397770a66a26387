"""The autoencoder against residual quantization in numpy, and its artifact."""

import copy
import json

import numpy as np
import pytest
import torch
from torch import Tensor

from modules.quantize import QuantizeMode
from modules.rqvae import RqVae

DIM, CATEGORIES = 6, 3
MODES = list(QuantizeMode)
CODEBOOKS = [
    {"codebook_update": "ema"},
    {"codebook_sim_vq": True},
    {"codebook_normalize": True, "normalize_output": True},
    {"hidden_dims": None},
]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_x(n: int = 60, seed: int = 0) -> Tensor:
    """Features of groups around a few centres, then categories."""
    centres = 3 * torch.randn(5, DIM, generator=seeded(9))
    values = centres[torch.arange(n) % 5] + 0.3 * torch.randn(n, DIM, generator=seeded(seed)) + 2
    return torch.cat([values, (torch.rand(n, CATEGORIES, generator=seeded(seed)) < 0.4).float()], 1)


def make(**changed) -> RqVae:
    torch.manual_seed(0)
    options = dict(embed_dim=4, hidden_dims=(8,), codebook_size=5, n_layers=3, n_cat_features=CATEGORIES) | changed
    return RqVae(DIM + CATEGORIES, **options)


def residual_codes(latent: np.ndarray, codebooks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Greedy residual quantization, one row and level at a time: codes [B, L], and what is left [B, D]."""
    codes = np.zeros((len(latent), len(codebooks)), dtype=int)
    left = latent.astype(np.float64).copy()
    for row in range(len(left)):
        for level, codebook in enumerate(codebooks):
            codes[row, level] = ((left[row] - codebook) ** 2).sum(1).argmin()
            left[row] -= codebook[codes[row, level]]
    return codes, left


def codebooks_of(model: RqVae) -> list[np.ndarray]:
    return [layer.codebook.detach().double().numpy() for layer in model.layers]


@pytest.mark.parametrize("mode", MODES)
def test_codes_are_those_of_greedy_residual_quantization(mode):
    model, x = make(codebook_mode=mode).eval(), make_x()
    model.initialize(x, seeded(0))
    with torch.no_grad():
        latent, out = model.encode(x), model.get_semantic_ids(x)
    codes, left = residual_codes(latent.numpy(), codebooks_of(model))
    assert out.sem_ids.tolist() == codes.tolist() and model.codes(x).tolist() == codes.tolist()
    assert out.embeddings.shape == out.residuals.shape == (60, 4, 3)
    np.testing.assert_allclose(latent - out.embeddings.sum(-1), left, atol=1e-5)
    torch.testing.assert_close(out.residuals[..., 0], latent)
    torch.testing.assert_close(out.residuals[..., 1:], out.residuals[..., :2] - out.embeddings[..., :2])


def test_the_loss_is_that_of_its_formula():
    model, x = make(commitment_weight=0.3).train(), make_x()
    model.initialize(x, seeded(0))
    with torch.no_grad():
        out = model(x)
        latent, mean, scale = model.encode(x).numpy(), model.standardize.mean, model.standardize.scale
        codes, left = residual_codes(latent, codebooks_of(model))
        decoded = model.decoder(torch.tensor(latent - left, dtype=torch.float32)).double().numpy()
    normalized = ((x[:, :DIM] - mean) / scale).double().numpy()
    p, labels = 1 / (1 + np.exp(-decoded[:, DIM:])), x[:, DIM:].numpy()
    squares = ((decoded[:, :DIM] - normalized) ** 2).sum(1)
    entropy = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).sum(1)
    assert float(out.reconstruction_loss) == pytest.approx((squares + entropy).mean(), rel=1e-5)
    quantization, residual = 0, latent.astype(np.float64)
    for level, codebook in enumerate(codebooks_of(model)):
        residual = residual - codebook[codes[:, level]]
        quantization += 1.3 * (residual**2).sum(1)
    assert float(out.quantize_loss) == pytest.approx(quantization.mean(), rel=1e-4)
    assert float(out.loss) == pytest.approx(float(out.reconstruction_loss + out.quantize_loss), rel=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("standardize", ["column", "global", "none"])
def test_training_learns(mode, standardize):
    model, x = make(codebook_mode=mode, standardize=standardize), make_x()
    model.initialize(x, seeded(0))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        out = model(x, temperature=0.2)
        out.loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(float(out.reconstruction_loss.detach()))
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("standardize", ["column", "global", "none"])
def test_decode_is_in_the_units_of_the_input(standardize):
    model, x = make(standardize=standardize), make_x()
    model.initialize(x, seeded(0))
    latent = torch.randn(7, 4, generator=seeded(1))
    with torch.no_grad():
        decoded, raw = model.decode(latent), model.decoder(latent)
    values = x[:, :DIM].double()
    mean, variance = values.mean(0), values.var(0, correction=0)
    scale = {"column": variance.sqrt(), "global": variance.mean().sqrt(), "none": 1.0}[standardize]
    expected = raw[:, :DIM] if standardize == "none" else raw[:, :DIM] * scale + mean
    torch.testing.assert_close(decoded[:, :DIM].double(), expected.double(), atol=1e-4, rtol=1e-4)
    assert torch.equal(decoded[:, DIM:], raw[:, DIM:]), "categories are logits"
    assert torch.equal(model.normalized(x)[:, DIM:], x[:, DIM:]), "categories are left as they are"


@pytest.mark.parametrize("options", CODEBOOKS)
def test_every_kind_of_codebook_is_fitted_and_used(options):
    model, x = make(**options).eval(), make_x(400)
    model.initialize(x, seeded(0))
    for level in model.codes(x).T:
        assert int(torch.bincount(level, minlength=5).min()) > 0
    with torch.no_grad():
        out = model.get_semantic_ids(x)
    assert float(out.quantize_loss.mean()) < 1.25 * float(out.residuals[..., 0].square().sum(1).mean())


def test_without_an_autoencoder_the_codes_are_residual_kmeans_of_the_features():
    model, x = make(hidden_dims=None, n_cat_features=0, standardize="none").eval(), make_x(400)
    model.initialize(x, seeded(0))
    codes, left = residual_codes(x.double().numpy(), codebooks_of(model))
    assert model.codes(x).tolist() == codes.tolist()
    decoded = model.decode(model.get_semantic_ids(x).embeddings.sum(-1)).detach()
    np.testing.assert_allclose(x - decoded, left, atol=1e-5)


def test_codes_do_not_depend_on_the_precision_around_them():
    model, x = make(), make_x(400)
    model.initialize(x, seeded(0))
    expected = model.codes(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.codes(x), expected)
        assert torch.equal(model.eval().get_semantic_ids(x).sem_ids, expected)
    assert torch.equal(model.codes(x.double()), expected)
    assert torch.equal(copy.deepcopy(model).double().codes(x), expected)


def test_equal_codes_are_told_apart_by_their_number_only():
    model, x = make(), make_x()
    with torch.no_grad():
        for layer in model.layers:
            layer.embedding.weight.copy_(layer.embedding.weight[:1].expand(5, -1))
    assert not model.codes(x).any()


def test_initial_codebooks_are_centroids_of_residuals():
    model, x = make(), make_x(400)
    model.initialize(x, seeded(0))
    residual = model.encode(x).detach()
    for layer in model.layers:
        ids = layer.nearest(residual)
        for code in ids.unique().tolist():
            torch.testing.assert_close(layer.codebook[code], residual[ids == code].mean(0), atol=0.05, rtol=0)
        before, residual = residual, (residual - layer.codebook[ids]).detach()
        assert float(residual.square().sum()) < 0.9 * float(before.square().sum())
    untouched = make(codebook_kmeans_init=False)
    codebook = untouched.layers[0].codebook.clone()
    untouched.initialize(x, seeded(0))
    assert torch.equal(untouched.layers[0].codebook, codebook) and bool(untouched.standardize.mean.any())


def test_codebooks_fitted_again_leave_no_code_unused():
    model, x = make(codebook_kmeans_init=False), make_x(400)
    model.initialize(x, seeded(0))
    with torch.no_grad():
        for layer in model.layers:
            layer.embedding.weight.fill_(100)  # dead, all of them
    model.fit_codebooks(x, seeded(0))
    for level in model.codes(x).T:
        assert int(torch.bincount(level, minlength=5).min()) > 0
    same = make(codebook_kmeans_init=True)
    same.initialize(x, seeded(0))
    for mine, other in zip(model.layers, same.layers, strict=True):
        assert torch.equal(mine.codebook, other.codebook), "as those of the beginning, the encoder being the same"


@pytest.mark.parametrize("training", [True, False])
def test_codes_do_not_depend_on_chunks_or_mode(training):
    model, x = make(codebook_mode=QuantizeMode.GUMBEL_SOFTMAX).train(training), make_x(50)
    whole = model.codes(x)
    assert torch.equal(model.codes(x, batch_size=7), whole) and whole.shape == (50, 3)
    assert model.training is model.layers[2].training is training


@pytest.mark.parametrize(
    "options", [{}, {"standardize": "none", "codebook_mode": QuantizeMode.STE, "n_layers": 1}, *CODEBOOKS]
)
def test_what_is_saved_is_loaded_bit_by_bit(tmp_path, options):
    model, x = make(**options), make_x()
    model.initialize(x, seeded(0))
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = RqVae.from_pretrained(tmp_path / "new" / "folder")
    assert not loaded.training and loaded.config == model.config
    assert [(name, tensor.tolist()) for name, tensor in loaded.state_dict().items()] == [
        (name, tensor.tolist()) for name, tensor in model.state_dict().items()
    ]
    assert torch.equal(loaded(x).loss, model.eval()(x).loss)


def test_a_distance_of_earlier_versions_is_read_or_refused(tmp_path):
    make().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"codebook_distance": "l2"}))
    assert RqVae.from_pretrained(tmp_path).config == config
    file.write_text(json.dumps(config | {"codebook_distance": "cosine"}))
    with pytest.raises(ValueError, match="do not make a tokenizer: codebook_distance is 'cosine'"):
        RqVae.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path, name):
    make().save_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds no {name}"):
        RqVae.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"standardize": "row"}, "RqVae.standardize = 'row': Input should be 'column', 'global' or 'none'"),
        ({"n_layers": 0}, "RqVae.n_layers = 0: Input should be greater than 0"),
        ({"hidden_dims": (16, 0)}, r"RqVae.hidden_dims.*\[1\] = 0: Input should be greater than 0"),
        ({"hidden_dims": 16}, "RqVae.hidden_dims.* = 16: Input should be a valid tuple"),
        ({"n_cat_features": 9}, "RqVae.n_cat_features is 9; the input has 9 columns"),
        ({"n_cat_features": -1}, "RqVae.n_cat_features = -1: Input should be greater than or equal to 0"),
        ({"activation": "tanh"}, "RqVae.activation = 'tanh': Input should be 'relu' or 'silu'"),
        ({"codebook_update": "sum"}, "RqVae.codebook_update = 'sum': Input should be"),
        ({"hidden_dims": None, "codebook_update": "ema"}, "leaves nothing to train by gradients: set"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_too_few_rows_for_the_codebooks_are_refused():
    with pytest.raises(ValueError, match="needs at least 5 rows; there are 4"):
        make().initialize(make_x(4), seeded(0))


def test_what_interactions_say_is_hidden_from_the_encoder_and_restored_by_the_decoder():
    mask, x, seen = np.array([False, True, True, False, False, False]), torch.randn(4000, 6), []
    options = {"embed_dim": 3, "hidden_dims": (5,), "codebook_size": 4, "standardize": "none"}
    model = RqVae(6, **options, drop_interactions=0.3, from_interactions=mask)
    model.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    error = model.train().autoencode(x).reconstruction_loss
    gone = (seen[0][:, mask] == 0).all(1)
    assert float(gone.double().mean()) == pytest.approx(0.3, abs=0.03)
    assert torch.equal(seen[0][~gone], x[~gone]) and torch.equal(seen[0][:, ~mask], x[:, ~mask])
    decoded = model.decoder(model.quantize(model.encoder(seen[0])).embeddings.sum(-1))
    torch.testing.assert_close(error, (decoded - x).square().sum(1).mean())
    model.eval().autoencode(x)
    assert torch.equal(seen[-1], x) and "from_interactions" not in model.state_dict()
    with pytest.raises(ValueError, match="RqVae.drop_interactions = 1.0: Input should be less than 1"):
        RqVae(6, drop_interactions=1.0)
