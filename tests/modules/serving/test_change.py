"""A catalogue that changes: vectors of what stays against dictionaries by prefix, scores and IDs before and after."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.items import Items
from modules.serving.change import carried_over, changed
from modules.serving.pipeline import Pipeline
from modules.serving.recommender import Recommender
from modules.tokenizer.semids import SemanticIds
from tests.modules.helpers import dense_vectors, described, make_model
from tests.pipeline import COLOURS, N_ITEMS

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # the changed model is in float32
PARTS = [
    dict(item_parts=("free", "codes", "nodes", "features"), node_parts=("free", "codes", "features")),
    dict(item_parts=("nodes",), node_parts=("free", "codes")),
    dict(item_parts=("features",), node_parts=("codes",)),
    dict(item_tokens=False, item_loss=0.0, node_parts=("free",), decoder_layers=1),
]


@st.composite
def changes(draw) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Codes before and after, and which item each was before, -1 for new ones. The first has the highest codes of those
    before, and stays; new ones may have higher last codes."""
    levels, size = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    prefix = st.tuples(*[st.integers(0, size - 1)] * (levels - 1))
    first = (size - 1,) * (levels - 1) + (6,)
    old, new = (st.tuples(prefix, st.integers(0, last)).map(lambda row: (*row[0], row[1])) for last in (6, 8))
    before = [first, *(draw(st.sets(old, max_size=12)) - {first})]
    stay = draw(st.sets(st.integers(0, len(before) - 1))) | {0}
    stay = draw(st.permutations(sorted(stay)))
    new = draw(st.sets(new, max_size=12)) - set(before)
    return torch.tensor(before), torch.tensor([*(before[n] for n in stay), *new]), stay + [-1] * len(new)


@settings(max_examples=60)
@given(changes(), st.sampled_from(PARTS))
def test_vectors_follow_items_and_prefixes_and_new_rows_are_zero(change, parts):
    before, after, items = change
    generator = torch.Generator().manual_seed(0)
    known = torch.randn(len(before), 5, generator=generator, dtype=torch.float64)  # as `make_model` draws them
    features = torch.stack([known[n] if n >= 0 else torch.randn(5).double() for n in items])
    model = make_model(before, **parts).double()
    sizes = tuple(torch.cat([before, after]).amax(0) + 1)
    ids = SemanticIds(after, sizes, [str(n) for n in range(len(after))], "made", "0" * 16)
    new = carried_over(model, ids, features.numpy(), torch.tensor(items)).double()
    (old_items, old_nodes), (new_items, new_nodes) = (
        dense_vectors(*made) for made in ((model, before, known), (new, after, features))
    )
    for n, item in enumerate(items if new_items is not None else []):
        if item >= 0:
            torch.testing.assert_close(new_items[n], old_items[item], **CLOSE)
        elif parts["item_parts"] == ("features",):
            torch.testing.assert_close(new_items[n], described(model.items.mlp, features[n]), **CLOSE)
    for depth, (old, now) in enumerate(zip(old_nodes, new_nodes, strict=True)):
        for prefix, vector in now.items():
            expected = old.get(prefix)
            if expected is None:
                below = [n for n, row in enumerate(after.tolist()) if tuple(row[: depth + 1]) == prefix]
                expected = untrained(model.nodes[depth], len(old), prefix[-1], features[below].mean(0), parts)
            torch.testing.assert_close(vector, expected, **CLOSE)


def untrained(level, n_nodes: int, code: int, features: torch.Tensor, parts: dict) -> torch.Tensor:
    """The vector of a node of which only code and features are known."""
    total, codes = torch.zeros(12, dtype=torch.float64), level.table[n_nodes * ("free" in parts["node_parts"]) :]
    if "codes" in parts["node_parts"] and code < len(codes):
        total = total + codes[code]
    return total + described(level.mlp, features) if "features" in parts["node_parts"] else total


@pytest.fixture(scope="module")
def pipeline(trained) -> Pipeline:
    return Pipeline.load(trained / "out" / "decoder", tokenizer=True)


NEW = Items([f"new{n}" for n in range(3)], [f"{COLOURS[n]} ball." for n in range(3)], [["ball"]] * 3)
GONE = ["item04", "item29"]


def test_old_ids_stay_and_new_ones_are_unique(pipeline):
    after, before = changed(pipeline, NEW, GONE).semantic_ids, pipeline.semantic_ids
    old, now = (
        {k: tuple(c) for k, c in zip(ids.item_keys, ids.codes.tolist(), strict=True)} for ids in (before, after)
    )
    assert list(now) == [key for key in old if key not in GONE] + NEW.keys
    assert all(now[key] == old[key] for key in now if key in old)
    assert len(set(now.values()) | {old[key] for key in GONE}) == N_ITEMS + len(NEW.keys)
    twins = pipeline.tokenizer.encode(NEW).tolist()
    assert [list(now[key][:2]) for key in NEW.keys] == twins  # the extra level tells them apart


def test_scores_of_old_items_differ_by_the_normalizers_alone(pipeline):
    after = changed(pipeline, NEW, GONE)
    histories = [["item01", "item08"], ["item20"]]
    ids, logits = after.semantic_ids, []
    same = [key for key in ids.item_keys if key not in NEW.keys]
    for made in (pipeline, after):
        recommender = Recommender(made)
        ranked = recommender.rank(histories, len(recommender.keys), exclude_seen=False)
        scores = torch.empty_like(ranked.scores).scatter(1, ranked.items, ranked.scores)
        logits.append(scores[:, [recommender.index[key] for key in same]])
    parents = [tuple(row[:-1]) for row in ids.codes[: len(same)].tolist()]
    groups = [[n for n, own in enumerate(parents) if own == parent] for parent in set(parents)]
    assert max(map(len, groups)) > 1
    for group in groups:  # the same normalizers down to their parent
        before, now = (part[:, group] - part[:, group[:1]] for part in logits)
        torch.testing.assert_close(now, before, rtol=1e-4, atol=1e-4)


def test_new_items_are_found_by_the_ranking_and_by_beams(pipeline, monkeypatch):
    after = changed(pipeline, NEW, GONE)
    recommender = Recommender(after)
    for exact in (True, False):
        monkeypatch.setattr(recommender, "_exact", exact)
        [found] = recommender.recommend([["item01"]], k=5, allow=NEW.keys)
        assert {item.key for item in found.items} == set(NEW.keys)
        assert {item.title for item in found.items} == {text[:-1] for text in NEW.texts}
    with pytest.raises(ValueError, match="cold_bonus needs the ranking of the whole catalogue"):
        recommender.rank([["item01"]], cold_bonus=1.0)


def test_a_bonus_moves_items_that_training_never_showed_and_no_other(pipeline):
    after = changed(pipeline, NEW)
    recommender = Recommender(after)
    ranked = [recommender.rank([["item01"]], N_ITEMS + 3, False, cold_bonus=bonus) for bonus in (0.0, 2.0)]
    plain, raised = (found.scores[0][found.items[0].argsort()] for found in ranked)
    assert (after.counts == 0).tolist() == [False] * N_ITEMS + [True] * 3
    torch.testing.assert_close((plain + 2.0 * (after.counts == 0)).log_softmax(0), raised, rtol=1e-4, atol=1e-4)


def test_a_changed_pipeline_is_saved_and_changed_again(pipeline, tmp_path):
    changed(pipeline, NEW, GONE).save(tmp_path)
    again = changed(Pipeline.load(tmp_path, tokenizer=True), remove=NEW.keys)
    vectors, expected = again.model.vectors(), pipeline.model.vectors()
    stay = [n for n, key in enumerate(pipeline.semantic_ids.item_keys) if key not in GONE]
    assert torch.equal(vectors.items, expected.items[stay]) and torch.equal(again.counts, pipeline.counts[stay])
    assert again.titles == [pipeline.titles[n] for n in stay]


def test_what_cannot_be_changed_is_named(pipeline):
    one = Items(["item01"], ["red ball."], [[]])
    for add, remove, message in (
        (one, (), "'item01' is in the catalogue already"),
        (Items(["a", "a"], ["x", "y"], [[], []]), (), "'a' is in the catalogue already, or twice"),
        (Items([], [], []), ["item01", "x", "y"], "2 keys to remove are not in the catalogue, such as 'x'"),
        (Items([], [], []), pipeline.semantic_ids.item_keys, "No item would be left"),
    ):
        with pytest.raises(ValueError, match=message):
            changed(pipeline, add, remove)
    with pytest.raises(ValueError, match="holds no tokenizer.*no tokenizer/, or it was loaded without"):
        changed(Pipeline(**{**vars(pipeline), "tokenizer": None}), NEW)
