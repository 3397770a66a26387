"""The retriever without padding against a padded twin with the same weights."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from common.schemas import Interactions
from data.batches import SequenceSource
from data.splits import windows
from modules.generation.beam_search import beam_search
from modules.model import EncoderDecoderRetrievalModel
from modules.tree import Tree
from ops.cross_entropy import Seen, linear_cross_entropy
from ops.jagged import lengths_to_offsets
from tests.modules.helpers import dense_log_probs, dense_queries, make_batch, make_model, random_catalogue

N_ITEMS = 20
CODES, SIZES = random_catalogue(N_ITEMS, seed=0)


def random_histories(lengths: list[int], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, N_ITEMS, (length,), generator=generator).tolist() for length in lengths]


LENGTHS = {
    "mixed": ([3, 1, 7, 2, 7], [3, 1, 5, 1, 0]),  # history items, targets
    "one item": ([1], [1]),
    "single targets": ([5, 1, 2], [1, 1, 1]),
    "far apart": ([140, 3], [140, 2]),  # tokens at more than the largest distance of the position bias
}
ALL = {"item_parts": ("free", "codes", "nodes", "features")}
LAYOUTS = {
    "both heads": ALL,
    "smoothed": {**ALL, "label_smoothing": 0.1},
    "tree alone": {"item_loss": 0.0, "item_parts": ("codes", "nodes"), "node_parts": ("free",), "features": 0},
    "item head alone": {"tree_loss": 0.0, "item_parts": ("free",), "features": 0},
    "decoder": {"decoder_layers": 2},
    "TIGER": {"decoder_layers": 2, "item_tokens": False, "node_parts": ("codes",), "features": 0},
    "bidirectional": {"decoder_layers": 1, "item_tokens": False, "causal_encoder": False},
}


def features_of(model: EncoderDecoderRetrievalModel) -> torch.Tensor | None:
    """As `make_model` draws them."""
    columns = model.nodes[-1].features if len(model.nodes) else None
    return None if columns is None else columns[model.tree.item_nodes[:, -1].long()]


def dense_losses(model, histories, targets, seen) -> tuple[torch.Tensor, torch.Tensor]:
    """The item head's loss and those of the levels, [L'], means over the targets."""
    state, queries, items, nodes = dense_queries(model, CODES, histories, targets, features_of(model))
    flat = torch.tensor([item for own in targets for item in own])
    head, levels = torch.zeros(()), torch.zeros(CODES.shape[1])
    if "items" in model.heads:
        logits, smoothing = state @ items.T, model.label_smoothing
        losses = []
        for row, gone, target in zip(logits, seen, flat.tolist(), strict=True):
            biased = row + 10 * model.seen * torch.tensor([n in gone for n in range(N_ITEMS)])
            losses.append(F.cross_entropy(biased, torch.tensor(target), label_smoothing=smoothing))
        head = torch.stack(losses).mean()
    if "tree" in model.heads:
        log_probs = dense_log_probs(queries, CODES, nodes)  # [P, N, L']
        smoothing, rows = model.label_smoothing, []
        for place, target in enumerate(flat.tolist()):
            losses = []
            for depth in range(CODES.shape[1]):
                prefix = CODES[target, :depth]
                siblings = [n for n in range(N_ITEMS) if torch.equal(CODES[n, :depth], prefix)]
                by_code = {int(CODES[n, depth]): log_probs[place, n, depth] for n in siblings}
                mean = torch.stack(list(by_code.values())).mean()
                own = by_code[int(CODES[target, depth])]
                losses.append(-(1 - smoothing) * own - smoothing * mean if len(by_code) > 1 else 0 * own)
            rows.append(torch.stack(losses))
        levels = torch.stack(rows).mean(0)
    return head, levels


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", LENGTHS)
def test_losses_and_gradients_are_those_of_the_padded_twin(case, layout):
    lengths, counts = LENGTHS[case]
    counts = [1] * len(lengths) if layout == "bidirectional" else counts
    histories, targets = random_histories(lengths), random_histories(counts, seed=1)
    model = make_model(CODES, **LAYOUTS[layout]).double()
    batch = make_batch(histories, targets)
    before = [
        row[: len(row) - len(own) + 1 + i] for row, own in zip(histories, targets, strict=True) for i in range(len(own))
    ]
    bounds = torch.tensor([0, *(len(set(items)) for items in before)]).cumsum(0)
    distinct = torch.tensor([item for items in before for item in sorted(set(items))])
    batch = dataclasses.replace(batch, seen=(bounds[:-1], bounds[1:], distinct))
    out, (head, levels) = model(batch), dense_losses(model, histories, targets, before)
    torch.testing.assert_close(out.items, head.to(out.items), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.levels, levels.to(out.levels), rtol=1e-9, atol=1e-9)
    whole = model.item_loss * head + model.tree_loss * levels.sum()
    torch.testing.assert_close(out.loss, whole, rtol=1e-9, atol=1e-9)
    names, parameters = zip(*model.named_parameters(), strict=True)
    theirs = torch.autograd.grad(whole, parameters)
    for name, mine, other in zip(names, torch.autograd.grad(out.loss, parameters), theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-8, atol=1e-9, msg=lambda text, n=name: f"{n}: {text}")


def test_a_catalogue_with_hashed_rows_learns_from_samples(monkeypatch):
    """The children are all there, and the sampled softmax over the items is close to the whole one."""
    monkeypatch.setattr("modules.model.SAMPLED_ITEMS", 100_000)
    tree, counts = Tree.build(CODES), torch.arange(N_ITEMS)
    features = torch.randn(N_ITEMS, 5, generator=torch.Generator().manual_seed(0))
    size = dict(dim=12, ff_dim=20, n_heads=2, head_dim=5, dropout=0.0)
    model = EncoderDecoderRetrievalModel(tree, features, counts, max_rows=4, **size).double()
    batch = make_batch(random_histories([3, 1, 7]), random_histories([3, 1, 5], seed=1))
    vectors, items = model.vectors(), batch.targets.values
    state = model._encoder_output(batch.history, vectors)[0].values
    rows = torch.cat([torch.arange(3), torch.tensor([3]), torch.arange(6, 11)])
    whole = F.cross_entropy(state[rows] @ vectors.items.T, items)
    torch.manual_seed(0)
    out = model(batch)
    torch.testing.assert_close(out.items, whole.to(out.items), rtol=0.02, atol=0.0)
    own = Tree.build(CODES).item_nodes[items].long()
    for depth in range(1, CODES.shape[1]):
        children = tree.first_child[depth].diff()[own[:, depth]]
        starts, losses = tree.first_child[depth][own[:, depth]], []
        for p, (start, count) in enumerate(zip(starts.tolist(), children.tolist(), strict=True)):
            logits = model.queries[depth](state[rows[p]]) @ vectors.nodes[depth][start : start + count].T
            losses.append(F.cross_entropy(logits, own[p, depth + 1] - start))
        torch.testing.assert_close(out.levels[depth], torch.stack(losses).mean().to(out.levels))
    out.loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p is not model.seen)
    monkeypatch.setattr("modules.model.SAMPLED_CHILDREN", (1, 1))  # fewer than children
    assert torch.isfinite(model(batch).loss)
    with pytest.raises(ValueError, match=f"max_rows = 2 must be at least the number of first codes, {tree.n_nodes[0]}"):
        EncoderDecoderRetrievalModel(tree, features, max_rows=2, **size)
    with pytest.raises(ValueError, match="item_tokens = False takes up to max_rows = 4 items"):
        EncoderDecoderRetrievalModel(tree, features, max_rows=4, item_tokens=False, **size)


@pytest.mark.parametrize("layout", ["both heads", "TIGER"])
def test_every_position_at_once_is_each_prefix_by_itself(layout):
    """Target i of a window follows its first i + 1 items: the history of a sample of its own."""
    sequences, model = random_histories([7, 2, 4]), make_model(CODES, **LAYOUTS[layout]).double()
    joint = model(make_batch([row[:-1] for row in sequences], [row[1:] for row in sequences]))
    alone = [model(make_batch([row[:n]], [[row[n]]])) for row in sequences for n in range(1, len(row))]
    torch.testing.assert_close(joint.loss, torch.stack([loss.loss for loss in alone]).mean())
    torch.testing.assert_close(joint.levels, torch.stack([loss.levels for loss in alone]).mean(0))


def test_samples_hold_the_histories_items_biased_where_they_were_consumed_before(monkeypatch):
    """Against the whole softmax; the first user had consumed, before each window, items that are in it again."""
    monkeypatch.setattr("modules.model.SAMPLED_ITEMS", 200_000)
    rows = [[1, 2, 3] * 4, [4, 5, 6, 7, 8], [9, 10, 9]]
    offsets = lengths_to_offsets(torch.tensor([len(row) for row in rows]))
    interactions = Interactions(torch.tensor(sum(rows, []), dtype=torch.int32), offsets)
    source = SequenceSource(interactions, windows(offsets.diff(), 4), 4, torch.device("cpu"), every_position=True)
    batch = source.batch(torch.arange(len(source)), None, 24, padding=2)
    model = EncoderDecoderRetrievalModel(
        Tree.build(CODES), None, None, 12, 20, 2, 5, dropout=0.0, item_parts=("free",), node_parts=("free",), max_rows=4
    ).double()
    with torch.no_grad():
        model.seen.fill_(0.4)  # so that each item counts
    torch.manual_seed(0)
    loss = model(batch).items
    vectors = model.vectors()
    state = model._encoder_output(batch.history, vectors)[0].values
    seen, weights = Seen(*batch.seen, model.seen_bias), batch.weights.double()
    whole = linear_cross_entropy(state, vectors.items, batch.targets.values, weights, 0.0, seen) / weights.sum()
    torch.testing.assert_close(loss, whole.to(loss), rtol=5e-4, atol=0.0)
    mine, theirs = (torch.autograd.grad(value, model.seen)[0] for value in (loss, whole))
    torch.testing.assert_close(mine, theirs, rtol=2e-3, atol=0.0)


def test_a_bidirectional_encoder_takes_one_target():
    model = make_model(CODES, **LAYOUTS["bidirectional"])
    with pytest.raises(ValueError, match="causal_encoder = True or train.every_position = False"):
        model(make_batch([[1, 2]], [[2, 3]]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_of_weight_0_leave_loss_and_gradients_as_they_were(layout):
    if layout == "bidirectional":
        histories, targets, extra = [[1, 2, 3], [5, 6]], [[8], [9]], [[4, 7]]
    else:
        histories, targets, extra = [[1, 2, 3], [5, 6]], [[2, 3, 8], [6, 9]], [[4, 7], [3]]
    model, results = make_model(CODES, **LAYOUTS[layout]).double(), []
    for padding in ([], extra):
        own = [[0] * (1 if layout == "bidirectional" else len(row)) for row in padding]
        batch = make_batch(histories + padding, targets + own)
        weights = torch.tensor([1.0] * sum(map(len, targets)) + [0.0] * sum(map(len, own)))
        out = model(dataclasses.replace(batch, target_weights=weights))
        results.append([out.loss, *torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_dropout_acts_in_training_only():
    model, batch = make_model(CODES, dropout=0.3), make_batch([[1, 2], [3]], [[2, 3], [4]])
    assert torch.equal(model(batch).loss, model(batch).loss)
    model.train()
    assert not torch.equal(model(batch).loss, model(batch).loss)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="no head to train"):
        make_model(CODES, item_loss=0.0, tree_loss=0.0)


@pytest.mark.parametrize("layout", ["both heads", "TIGER"])
def test_what_is_saved_is_loaded_bit_by_bit(tmp_path, layout):
    options = {**LAYOUTS[layout], "features": 0, "item_parts": ("free",), "node_parts": ("codes",)}
    model, tree = make_model(CODES, **options), Tree.build(CODES)
    model.item_share.fill_(0.25)
    model.train().save_pretrained(tmp_path / "new" / "folder")
    loaded = EncoderDecoderRetrievalModel.from_pretrained(tmp_path / "new" / "folder", tree)
    assert not loaded.training and loaded.config == model.config and float(loaded.item_share) == 0.25
    weights = model.state_dict()
    assert weights.keys() == loaded.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    batch = make_batch([[1, 2], [3]], [[3], [4]])
    assert torch.equal(loaded(batch).levels, model.eval()(batch).levels)
    with pytest.raises(ValueError, match="generates the IDs of tree"):
        EncoderDecoderRetrievalModel.from_pretrained(tmp_path / "new" / "folder", Tree.build(CODES.flip(0)))
    save_file({**weights, "nodes.0.mlp.2.bias": torch.zeros(8)}, tmp_path / "new" / "folder" / "model.safetensors")
    with pytest.raises(ValueError, match="earlier version, which differs in nodes.0.mlp.2.bias: train it anew"):
        EncoderDecoderRetrievalModel.from_pretrained(tmp_path / "new" / "folder", tree)
    config = tmp_path / "new" / "folder" / "config.json"
    config.write_text(json.dumps({"level_sizes": [3, 3], "prefix_buckets": 64}))
    with pytest.raises(ValueError, match="earlier version"):
        EncoderDecoderRetrievalModel.from_pretrained(tmp_path / "new" / "folder", tree)


@pytest.mark.parametrize("layout", ["both heads", "TIGER"])
def test_a_trained_model_ranks_what_it_has_seen_first(layout):
    """The item after n is n + 1: learned from a few walks, found by the search."""
    model = make_model(CODES, **LAYOUTS[layout], dim=16, dropout=0.0).train()
    walks = [[(start + step) % N_ITEMS for step in range(6)] for start in range(N_ITEMS)]
    batch = make_batch([walk[:-1] for walk in walks], [walk[1:] for walk in walks])
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    first = float(model(batch).loss.detach())
    for _ in range(200):
        optimizer.zero_grad()
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.3 * first
    encoded = model.eval().encode(batch.history, vectors := model.vectors())
    ranked = beam_search(model, encoded, vectors, beams=5).best(0.0, 5)
    assert ranked.items[:, 0].tolist() == [walk[-1] for walk in walks]
