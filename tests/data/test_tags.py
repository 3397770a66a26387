"""Which tags a split knows, and what the texts say of them, by loops."""

from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.schemas import Interactions
from data.corpus import Corpus
from data.splits import leave_one_out, temporal
from data.tags import MAX_TAGS, Tags

N_ITEMS, NAMES = 4, sorted("abcdefghijkl")
tag = st.tuples(st.integers(-1, 2), st.integers(0, N_ITEMS - 1), st.integers(0, len(NAMES) - 1), st.integers(0, 40))
row = st.lists(st.tuples(st.integers(0, 40), st.integers(0, N_ITEMS - 1)), min_size=1, max_size=9).map(sorted)


@settings(max_examples=50)
@given(st.lists(row, min_size=3, max_size=3), st.lists(tag, max_size=60), st.booleans())
def test_texts_get_what_lies_before_the_cut_and_is_not_about_what_is_evaluated(rows, given_tags, by_time):
    flat = [pair for row in rows for pair in row]
    offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
    times, items = (torch.tensor([pair[n] for pair in flat]) for n in (0, 1))
    interactions = Interactions(items.int(), offsets, times)
    try:
        splits = temporal(interactions, 0.2, 0.2) if by_time else leave_one_out(interactions)
    except ValueError:  # nobody to evaluate
        return
    cut = sorted(times.tolist())[round(0.6 * len(flat))] if by_time else 99
    pairs = set()
    for user, events in enumerate(rows):
        late = [item for time, item in events if time >= cut] if by_time else [item for _, item in events[-2:]]
        pairs |= {(user, item) for item in late} if by_time or len(events) > 2 else set()
    counts = [Counter() for _ in range(N_ITEMS)]
    for user, item, name, time in given_tags:
        if time < cut and (user, item) not in pairs:
            counts[item][NAMES[name]] += 1
    best = [sorted(counter, key=lambda name: (-counter[name], name))[:MAX_TAGS] for counter in counts]  # noqa: B023
    texts = [f"Item {n}." for n in range(N_ITEMS)]
    expected = [f"{text} Tags: {', '.join(names)}." if names else text for text, names in zip(texts, best, strict=True)]

    columns = torch.tensor(given_tags, dtype=torch.int64).reshape(-1, 4).T
    keys = [str(n) for n in range(N_ITEMS)]
    corpus = Corpus.build("tiny", interactions, keys, ["u", "v", "w"], texts, [[]] * N_ITEMS, Tags(*columns, NAMES))
    assert corpus.texts() == texts
    corpus.apply_split(splits)
    assert corpus.texts() == expected


def test_tags_are_saved_with_their_corpus_and_change_its_hash(tmp_path):
    interactions = Interactions(torch.tensor([0, 1, 0], dtype=torch.int32), torch.tensor([0, 3]))
    tags = [Tags(*torch.tensor([[-1, -1], [0, 1], [0, place], [5, 6]]), ["fun", "ö"]) for place in (0, 1)]
    one, other = (
        Corpus.build("tiny", interactions, ["a", "b"], ["u"], ["A.", "B."], [["x"], []], each) for each in tags
    )
    assert one.hash != other.hash
    one.save(tmp_path / "tiny")
    loaded = Corpus.load(tmp_path / "tiny")
    for corpus in (one, loaded):
        corpus.apply_split(leave_one_out(interactions))
        assert corpus.texts() == ["A. Tags: fun.", "B. Tags: fun."] and corpus.categories() == [["x"], []]
    assert loaded.hash == one.hash and loaded.text_hash == one.text_hash != other.text_hash
