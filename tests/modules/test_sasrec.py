"""SASRec against a plain loop over users in float64."""

import copy

import pytest
import torch
import torch.nn.functional as F

from common.schemas import SeqBatch
from modules.sasrec import SasRec
from ops.jagged import JaggedTensor
from tests.ops.rows import jagged

N_ITEMS, MAX_ITEMS, DIM, HEADS = 23, 6, 16, 2
NEAR = {"atol": 1e-4, "rtol": 1e-4}


def small(dropout: float = 0.0) -> SasRec:
    model = SasRec(N_ITEMS, MAX_ITEMS, DIM, n_layers=2, n_heads=HEADS, dropout=dropout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4)  # no zeros and ones that would hide a missing term
    return model


def one_user(model: SasRec, items: torch.Tensor) -> torch.Tensor:
    """States [n, dim] of one history [n]: the equations, with torch's own attention and a mask."""
    n = len(items)
    x = model.vectors[items] + model.positions[:n].flip(0)
    for block in model.blocks:
        q, k, v = block.query_key_value(block.attention_norm(x)).view(n, 3, HEADS, DIM // HEADS).permute(1, 2, 0, 3)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + block.out(attended.transpose(0, 1).reshape(n, DIM))
        y = block.ff_norm(x)
        x = x + block.ff[3](F.gelu(block.ff[0](y)))
    return F.layer_norm(x, (DIM,), model.norm.weight, model.norm.bias)


def rows(lengths: list[int]) -> JaggedTensor:
    histories = [torch.randint(0, N_ITEMS, (n,)) for n in lengths]
    return jagged(histories)


def test_states_loss_and_gradients_are_those_of_a_loop_over_users():
    model = small()
    exact = copy.deepcopy(model).double()
    history = rows([3, MAX_ITEMS, 1, 4])
    targets = torch.randint(0, N_ITEMS, (14,))
    weights = torch.tensor([1.0] * 10 + [0.0] * 4)  # the last row is padding
    batch = SeqBatch(torch.zeros(4), history, history.with_values(targets), target_weights=weights)

    bounds = history.offsets.tolist()
    expected = [one_user(exact, history.values[a:b]) for a, b in zip(bounds, bounds[1:], strict=False)]
    joined = torch.cat(expected)
    loss = F.cross_entropy(joined[:10] @ exact.vectors.T, targets[:10])
    loss.backward()

    torch.testing.assert_close(model.states(history).double(), joined, **NEAR)
    torch.testing.assert_close(model.state(history).double(), torch.stack([own[-1] for own in expected]), **NEAR)
    found = model(batch)
    found.backward()
    torch.testing.assert_close(found.double(), loss, **NEAR)
    for (name, own), other in zip(model.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(own.grad.double(), other.grad, **NEAR, msg=lambda text, name=name: f"{name}: {text}")


def test_without_weights_every_target_counts_the_same():
    model, history = small(), rows([2, 5])
    batch = SeqBatch(torch.zeros(2), history, history.with_values(torch.randint(0, N_ITEMS, (7,))))
    weighted = SeqBatch(batch.user, history, batch.targets, target_weights=torch.full((7,), 2.0))
    torch.testing.assert_close(model(batch), model(weighted))


def test_dropout_is_for_training_alone():
    model, history = small(dropout=0.5), rows([4, 4])
    assert not torch.equal(model.states(history), model.states(history))
    model.eval()
    assert torch.equal(model.states(history), model.states(history))


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match="SasRec.dim = 10 must be a multiple of SasRec.n_heads = 3"):
        SasRec(5, 5, dim=10, n_heads=3)
