"""The retriever without padding against a padded twin with the same weights."""

import dataclasses

import pytest
import torch

from modules.generation.beam_search import beam_search
from modules.generation.trie import Trie
from modules.model import EncoderDecoderRetrievalModel
from tests.modules.helpers import dense_logits, dense_losses, make_batch, make_model, random_catalogue

N_ITEMS = 20
CODES, SIZES = random_catalogue(N_ITEMS, seed=0)


def random_histories(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, N_ITEMS, (length,), generator=generator).tolist() for length in lengths]


def tail_targets(counts: list[int]) -> list[list[int]]:
    return random_histories(counts, seed=1)


LENGTHS = {
    "mixed": ([3, 1, 7, 2, 7], [3, 1, 5, 1, 0]),  # history items, targets
    "one user": ([4], [4]),
    "one item": ([1], [1]),
    "single targets": ([5, 1, 2], [1, 1, 1]),
    "no history": ([0, 2], [1, 1]),
    "far apart": ([45, 3], [45, 2]),  # tokens at more than the largest distance of the position bias
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("case", LENGTHS)
def test_outputs_and_gradients_are_those_of_the_padded_twin(case, causal, dtype):
    lengths, counts = LENGTHS[case]
    counts = counts if causal else [1] * len(lengths)
    histories, targets, users = random_histories(lengths), tail_targets(counts), [40, 3, 3, 10**9, 5][: len(lengths)]
    model = make_model(SIZES, causal_encoder=causal).to(dtype)
    batch = make_batch(CODES, histories, targets, users)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-12
    expected_logits = dense_logits(model, CODES, histories, targets, users)
    for mine, other in zip(model.level_logits(batch, CODES[batch.targets.values]), expected_logits, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance)
    losses = dense_losses(expected_logits, CODES, targets).mean(0)
    out = model(batch, Trie.build(CODES))
    torch.testing.assert_close(out.level_losses, losses, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.loss, losses.sum(), rtol=tolerance, atol=tolerance)
    names, parameters = zip(*model.named_parameters(), strict=True)
    theirs = torch.autograd.grad(losses.sum(), parameters)
    for name, mine, other in zip(names, torch.autograd.grad(out.loss, parameters), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("lengths", [[6, 1, 3], [12]])
def test_every_position_at_once_is_each_prefix_by_itself(lengths):
    """Target i of a window follows its first i + 1 items: the history of a sample of its own."""
    sequences = random_histories([length + 1 for length in lengths])
    model, trie = make_model(SIZES), Trie.build(CODES)
    joint = make_batch(CODES, [row[:-1] for row in sequences], [row[1:] for row in sequences])
    joint_logits = model.level_logits(joint, CODES[joint.targets.values])
    losses, place = [], 0
    for user, row in enumerate(sequences):
        for position in range(1, len(row)):
            alone = make_batch(CODES, [row[:position]], [[row[position]]], [user])
            for together, separate in zip(joint_logits, model.level_logits(alone, CODES[[row[position]]]), strict=True):
                torch.testing.assert_close(together[place], separate[0], rtol=1e-5, atol=1e-5)
            losses.append(model(alone, trie).level_losses)
            place += 1
    torch.testing.assert_close(model(joint, trie).level_losses, torch.stack(losses).mean(0), rtol=1e-5, atol=1e-5)


def test_a_bidirectional_encoder_takes_one_target():
    model = make_model(SIZES, causal_encoder=False)
    batch = make_batch(CODES, [[1, 2]], [[2, 3]])
    with pytest.raises(ValueError, match="causal_encoder = True or train.every_position = False"):
        model(batch, Trie.build(CODES))


def test_a_single_level_is_a_softmax_over_the_items():
    codes = torch.tensor([[2], [0], [3]])
    model, histories, targets = make_model((4,)), [[0, 2], [1]], [[1], [2]]
    out = model(make_batch(codes, histories, targets), Trie.build(codes))
    logits = dense_logits(model, codes, histories, targets, [0, 1])
    torch.testing.assert_close(out.loss, dense_losses(logits, codes, targets).mean(), rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_only():
    model, trie = make_model(SIZES, dropout=0.3), Trie.build(CODES)
    batch = make_batch(CODES, [[1, 2], [3]], [[2, 3], [4]])
    assert torch.equal(model(batch, trie).loss, model(batch, trie).loss)
    model.train()
    assert not torch.equal(model(batch, trie).loss, model(batch, trie).loss)


@pytest.mark.parametrize("options", [{}, {"causal_encoder": False, "prefix_buckets": 0}])
def test_what_is_saved_is_loaded_bit_by_bit(tmp_path, options):
    model, trie = make_model(SIZES, **options), Trie.build(CODES)
    model.train().save_pretrained(tmp_path / "new" / "folder")
    loaded = EncoderDecoderRetrievalModel.from_pretrained(tmp_path / "new" / "folder")
    assert not loaded.training and loaded.config == model.config and loaded.level_sizes == SIZES
    weights = model.state_dict()
    assert weights.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    batch = make_batch(CODES, [[1, 2], [3]], [[3], [4]])
    assert torch.equal(loaded(batch, trie).level_losses, model.eval()(batch, trie).level_losses)


def test_a_trained_model_ranks_what_it_has_seen_first():
    """The item after n is n + 1: learned from a few walks, found by the search."""
    torch.manual_seed(0)
    model = EncoderDecoderRetrievalModel(SIZES, 16, 32, 2, 8, 1, 1, dropout=0.0, user_buckets=5, prefix_buckets=64)
    trie = Trie.build(CODES)
    walks = [[(start + step) % N_ITEMS for step in range(6)] for start in range(N_ITEMS)]
    batch = make_batch(CODES, [walk[:-1] for walk in walks], [walk[1:] for walk in walks])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    first = float(model(batch, trie).loss.detach())
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(batch, trie).loss
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1 * first
    ranked = beam_search(model.eval(), batch, trie, beams=5)
    assert ranked.items[:, 0].tolist() == [walk[-1] for walk in walks]


def test_targets_of_weight_0_leave_loss_and_gradients_as_they_were():
    codes, sizes = random_catalogue(12, seed=0)
    trie = Trie.build(codes)
    model = make_model(sizes).double()
    results = []
    for fillers in ([], [[4, 7], []]):
        batch = make_batch(codes, [[1, 2, 3], [5, 6], *fillers], [[2, 3, 8], [6, 9], *([0] * len(f) for f in fillers)])
        weights = torch.tensor([1.0] * 5 + [0.0] * sum(map(len, fillers)))
        losses = model(dataclasses.replace(batch, target_weights=weights), trie)
        results.append([losses.loss, *losses.level_losses, *torch.autograd.grad(losses.loss, model.parameters())])
        if not fillers:
            assert torch.allclose(losses.loss, model(batch, trie).loss)
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs)
