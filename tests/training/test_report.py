"""What runs print."""

from types import SimpleNamespace

import pytest
import torch

from training import report
from training.metrics import all_figures, bins, ranking_metrics
from training.report import Speed, retrieval_table, verdict


@pytest.mark.parametrize(("excluded", "protocol"), [(False, "all"), (True, "new")])
def test_every_figure_stands_in_its_row_and_column(capsys, tmp_path, excluded, protocol):
    ranks = {row: {name: torch.randint(0, 20, (50,)) for name in ("all", "new")} for row in ("most_popular", "tree")}
    lengths = torch.randint(1, 8, (50,))
    groups = {"target_in_training": bins(lengths, (0, 1, 6, 21)), "history": bins(lengths, (1, 6, 11))}
    figures = all_figures(ranks, groups, (1, 5, 10, 20), n_items=19)
    metrics = {f"test/{key}": value for key, value in figures.items()}
    metrics |= {"valid/recall@10": 0.25, "valid/ndcg@10": 0.125}
    retrieval_table(metrics, "leave-one-out", excluded, tmp_path)
    lines = capsys.readouterr().out.splitlines()

    def cells(start: str) -> list[list[str]]:
        return [line[len(start) :].split() for line in lines if line.startswith(start)]

    for row, title in (("most_popular", "  most popular"), ("tree", "  tree alone")):
        own = [ranking_metrics(ranks[row][name], (5, 10)) for name in ("all", "new")]
        order = ("recall@5", "ndcg@5", "recall@10", "ndcg@10")
        assert cells(title) == [[f"{half[name]:.4f}" for half in own for name in order]]
    short = lengths < 6
    ndcg = (ranking_metrics(ranks[row][protocol][short], (10,))["ndcg@10"] for row in ranks)
    line = [str(int(short.sum())), *(f"{value:.4f}" for value in ndcg)]
    assert cells("  1-5") == [line, line]  # the same bins for both kinds of groups
    assert any("recall@10 0.2500, ndcg@10 0.1250" in line for line in lines)
    missed = int((ranks["most_popular"]["new"] >= 19).sum())
    assert any(line.startswith(f"50 users. 0 targets never occur in training. {missed} were") for line in lines)


def test_the_speed_counts_neither_evaluation_nor_recording(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock.now)
    speed = Speed()
    for _ in range(4):
        speed.start()
        clock.now += 0.5  # a step
        assert speed.steps_per_second() == 2.0
        speed.stop()
        clock.now += 60  # evaluation
    speed.start()
    clock.now += 8.0  # a step that is recorded
    assert speed.steps_per_second(recording=7.5) == 2.0


@pytest.mark.parametrize(("unique", "found"), [(0.8, "healthy"), (0.0, "most items share their codes with another")])
def test_a_verdict_looks_at_usage_and_at_ids(capsys, unique, found):
    metrics = {"usage_1": 1.0, "usage_2": 0.95, "id_unique_share": unique}
    verdict(metrics, 0.9, is_error=True, show=True)
    assert capsys.readouterr().out.startswith(f"Verdict: {found}")
    with pytest.raises(ValueError, match="Codebook collapse: level 2 uses 95.0%"):
        verdict(metrics, 0.96, is_error=True, show=True)
