"""Gradients through the choice of a code: against Householder reflections, and by hand."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modules.quantize import EMA_DECAY, Quantize, QuantizeMode, first_smallest, rotation_trick

MODES = list(QuantizeMode)


def reflect(normal: Tensor) -> Tensor:
    """The reflection I - 2 n n' / n'n. Shape: [D] -> [D, D]."""
    return torch.eye(len(normal), dtype=normal.dtype) - 2 * normal[:, None] * normal / normal.dot(normal)


def rotation(x: Tensor, embedding: Tensor) -> Tensor:
    """|e|/|x| times the rotation in the plane of x and e that turns x to e: of two reflections, [D, D].

    The first sends x to minus the direction of e, the second turns that around.
    """
    u, q = x / x.norm(), embedding / embedding.norm()
    return embedding.norm() / x.norm() * reflect(q) @ reflect(u + q)


vectors = st.lists(st.floats(-100, 100, width=32), min_size=4, max_size=4)


@settings(max_examples=25)
@given(st.integers(1, 8), st.integers(2, 6), st.integers(0, 10_000))
def test_the_jacobian_of_the_rotation_trick_is_a_scaled_rotation(batch, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    x, embedding = torch.randn(2, batch, dim, dtype=torch.float64, generator=generator)
    jacobian = torch.autograd.functional.jacobian(lambda rows: rotation_trick(rows, embedding), x)  # [B, D, B, D]
    for b in range(batch):
        expected = rotation(x[b], embedding[b])
        torch.testing.assert_close(expected @ x[b], embedding[b], rtol=1e-6, atol=1e-6)
        orthogonal = expected * x[b].norm() / embedding[b].norm()
        torch.testing.assert_close(orthogonal @ orthogonal.T, torch.eye(dim, dtype=torch.float64), rtol=0, atol=1e-6)
        assert float(torch.linalg.det(orthogonal)) == pytest.approx(1, abs=1e-6)
        torch.testing.assert_close(jacobian[b, :, b], expected, rtol=1e-8, atol=1e-8)
        jacobian[b, :, b] = 0
    assert not jacobian.any(), "rows depend on themselves only"


@settings(max_examples=50)
@given(vectors, vectors, st.sampled_from([torch.float32, torch.float64]))
def test_the_value_of_the_rotation_trick_is_the_code_exactly(x, embedding, dtype):
    x, embedding = (torch.tensor([row], dtype=dtype, requires_grad=True) for row in (x, embedding))
    passed = rotation_trick(x, embedding)
    assert torch.equal(passed, embedding)
    (grad,) = torch.autograd.grad(passed.sum(), x)
    assert bool(grad.isfinite().all())


@pytest.mark.parametrize(
    ("x", "embedding"),
    [
        ([1.0, 2.0], [-2.0, -4.0]),  # opposite directions
        ([1.0, 2.0], [-1.0, -2.0]),
        ([0.0, 0.0], [1.0, 2.0]),
        ([1.0, 2.0], [0.0, 0.0]),
        ([0.0, 0.0], [0.0, 0.0]),
        ([1e-30, 0.0], [1.0, 1.0]),
    ],
)
def test_where_the_rotation_is_undefined_the_gradient_goes_straight_through(x, embedding):
    x, embedding = (torch.tensor([row], requires_grad=True) for row in (x, embedding))
    passed = rotation_trick(x, embedding)
    assert torch.equal(passed, embedding)
    (grad,) = torch.autograd.grad((passed * torch.tensor([3.0, -5.0])).sum(), x)
    assert grad.tolist() == [[3, -5]]


def test_equal_vectors_are_not_turned():
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, dtype=torch.float64)
    (grad,) = torch.autograd.grad((rotation_trick(x, x.detach().clone()) * weights).sum(), x)
    torch.testing.assert_close(grad, weights)


def make(mode: QuantizeMode, size: int = 7, dim: int = 4, seed: int = 0, **options) -> tuple[Quantize, Tensor]:
    torch.manual_seed(seed)
    return Quantize(dim, size, mode, commitment_weight=0.25, **options), torch.randn(20, dim, requires_grad=True)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_id_is_that_of_the_nearest_code(mode, size):
    layer, x = make(mode, size)
    expected = [int(((row - layer.codebook) ** 2).sum(1).argmin()) for row in x.detach().double()]
    for training in (True, False):
        assert layer.train(training)(x).ids.tolist() == expected
    out = layer.eval()(x)
    assert torch.equal(out.embeddings, layer.codebook[expected])
    difference = (x - layer.codebook[expected]).detach()
    torch.testing.assert_close(out.loss, 1.25 * difference.square().sum(1))


@pytest.mark.parametrize(("size", "k"), [(1, 1), (7, 7), (64, 5)])
def test_codes_are_ranked_by_distance_and_then_by_number(size, k):
    torch.manual_seed(0)
    layer = Quantize(6, size, QuantizeMode.STE, 0.25)
    x = torch.randn(20, 6, dtype=torch.float64)
    with torch.no_grad():
        layer.embedding.weight[size // 2] = layer.embedding.weight[0]  # equally near to all
        distances, codes = layer.ranked(x, k)
    book = layer.embedding.weight.detach().double().numpy()
    expected, scale = ((x.numpy()[:, None] - book) ** 2).sum(-1), np.abs(book).max() ** 2
    for row in range(len(x)):
        order = sorted(range(size), key=lambda code: (round(expected[row, code], 9), code))[:k]
        assert codes[row].tolist() == order
        np.testing.assert_allclose(distances[row] * scale / 2**24, expected[row, order], atol=scale / 2**24)


def test_of_equal_codes_the_first_is_taken():
    layer, x = make(QuantizeMode.STE, size=40)
    with torch.no_grad():
        layer.codebook.copy_(layer.codebook[:1].repeat(40, 1))
    assert layer.nearest(x).tolist() == [0] * len(x)


def test_straight_through_gradients():
    layer, x = make(QuantizeMode.STE)
    out = layer(x)
    assert torch.equal(out.embeddings, layer.codebook[out.ids])
    weights = torch.randn_like(x)
    grad_x, grad_codes = torch.autograd.grad(
        (out.embeddings * weights).sum(), (x, layer.codebook), retain_graph=True, allow_unused=True
    )
    assert torch.equal(grad_x, weights) and grad_codes is None


@pytest.mark.parametrize("mode", [QuantizeMode.STE, QuantizeMode.ROTATION_TRICK])
def test_the_loss_moves_the_chosen_codes_to_their_inputs(mode):
    layer, x = make(mode)
    out = layer(x)
    difference = (x - layer.codebook[out.ids]).detach()
    torch.testing.assert_close(out.loss, 1.25 * difference.square().sum(1))
    grad_x, grad_codes = torch.autograd.grad(out.loss.sum(), (x, layer.codebook))
    torch.testing.assert_close(grad_x, 0.5 * difference)
    torch.testing.assert_close(grad_codes, torch.zeros_like(grad_codes).index_add_(0, out.ids, -2 * difference))


def test_the_layer_rotates_in_training():
    layer, x = make(QuantizeMode.ROTATION_TRICK)
    out = layer(x)
    assert torch.equal(out.embeddings, layer.codebook[out.ids])
    weights = torch.randn_like(x)
    (grad,) = torch.autograd.grad((out.embeddings * weights).sum(), x)
    for b in range(len(x)):
        matrix = rotation(x[b].detach().double(), layer.codebook[out.ids[b]].detach().double())
        torch.testing.assert_close(grad[b].double(), matrix.T @ weights[b].double(), rtol=1e-4, atol=1e-4)


def test_gumbel_becomes_the_nearest_code_as_the_temperature_falls():
    """Codes far apart: the noise of the draw can't change the nearest one, the temperature only blurs it."""
    layer, x = make(QuantizeMode.GUMBEL_SOFTMAX)
    with torch.no_grad():
        layer.codebook.mul_(30)
        x = (layer.codebook[torch.arange(20) % 7] + 0.1 * torch.randn(20, 4)).requires_grad_()
    errors = []
    for temperature in (1000.0, 300.0, 1.0):
        torch.manual_seed(0)
        out = layer(x, temperature)
        errors.append(float((out.embeddings - layer.codebook[out.ids]).detach().norm()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-3


def test_cold_gumbel_draws_codes_by_the_softmax_of_the_negative_squared_distances():
    layer, _ = make(QuantizeMode.GUMBEL_SOFTMAX, size=3, dim=1)
    with torch.no_grad():
        layer.codebook.copy_(torch.tensor([[0.0], [1.0], [2.0]]))
    n = 4000
    drawn = layer(torch.full((n, 1), 0.4), temperature=1e-3).embeddings.detach().squeeze(1)
    weights = torch.exp(-torch.tensor([0.16, 0.36, 2.56]))
    for code, p in enumerate((weights / weights.sum()).tolist()):
        share = float(((drawn - code).abs() < 1e-3).float().mean())
        assert abs(share - p) < 4 * (p * (1 - p) / n) ** 0.5 + 0.005  # a few draws are ties


def test_gumbel_passes_gradients_to_the_input_and_all_codes():
    layer, x = make(QuantizeMode.GUMBEL_SOFTMAX)
    grads = torch.autograd.grad(layer(x, temperature=5.0).embeddings.square().sum(), (x, layer.codebook))
    assert all(bool(grad.isfinite().all()) and bool(grad.any(-1).all()) for grad in grads)


def test_averaged_codes_are_the_moving_means_of_their_inputs():
    layer, x = make(QuantizeMode.STE, update="ema")
    layer.fit(torch.randn(30, 4), torch.Generator().manual_seed(0))
    start = layer.codebook.clone()
    counts, sums = np.ones(7), start.double().numpy()
    for _ in range(3):
        ids = layer.nearest(x).numpy()
        one_hot = np.eye(7)[ids]
        counts = EMA_DECAY * counts + (1 - EMA_DECAY) * one_hot.sum(0)
        sums = EMA_DECAY * sums + (1 - EMA_DECAY) * one_hot.T @ x.detach().double().numpy()
        out = layer(x)
        np.testing.assert_allclose(layer.codebook, sums / counts[:, None], atol=1e-5)
    (grad,) = torch.autograd.grad(out.loss.sum(), x, allow_unused=True)
    assert bool(grad.any()) and not layer.embedding.weight.requires_grad


def test_simvq_moves_all_codes_through_its_map():
    layer, x = make(QuantizeMode.STE, sim_vq=True)
    torch.testing.assert_close(layer.codebook, layer.embedding.weight @ layer.out_proj[0].weight.T)
    before = layer.codebook.detach().clone()
    layer(x[:1]).loss.sum().backward()
    with torch.no_grad():
        layer.out_proj[0].weight -= 0.1 * layer.out_proj[0].weight.grad
    assert bool((layer.codebook != before).any(1).all()), "one input moves every code"
    codes = torch.randn(7, 4)
    layer.fit(codes, torch.Generator().manual_seed(0))
    assert sorted(layer.codebook.tolist()) == sorted(codes.tolist())


def test_normalized_codes_have_length_one():
    layer, _ = make(QuantizeMode.STE, normalize=True)
    torch.testing.assert_close(layer.codebook.norm(dim=1), torch.ones(7))


def test_values_apart_by_rounding_are_ties_that_the_first_wins():
    rows = torch.tensor([[3.0, 1.0 + 1e-14, 1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [5.0, 4.0, 4.1, 9.0]], dtype=torch.float64)
    assert first_smallest(rows).tolist() == [1, 0, 1]
    assert first_smallest(rows[:, [0, 2, 1, 3]].float()).tolist() == [1, 0, 2]


def test_averages_are_not_of_mapped_codes():
    with pytest.raises(ValueError, match="goes with neither codebook_sim_vq"):
        make(QuantizeMode.STE, update="ema", sim_vq=True)
