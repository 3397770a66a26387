"""The page of a small pipeline: whole, safe, and with nothing to fetch."""

import json
import re

import torch

from modules.serving.inspection import HeldOut, first_codes
from modules.serving.pipeline import Pipeline
from modules.serving.recommender import Recommender
from modules.tokenizer.semids import SemanticIds
from tests.modules.helpers import make_model, random_catalogue
from training import page

N = 23


def charts(html: str) -> list[list[dict]]:
    """The traces of each chart."""
    starts = re.finditer(r'Plotly\.newPlot\(\s*"[0-9a-f-]+",\s*', html)
    return [json.JSONDecoder().raw_decode(html, match.end())[0] for match in starts]


def test_the_page_shows_all_and_fetches_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "MAX_TILES", 20)
    codes, sizes = random_catalogue(N, seed=1)
    ids = SemanticIds(codes, sizes, [str(n) for n in range(N)], "made", "0" * 16)
    titles = [f"</script><b>{n}" for n in range(N)]
    pipeline = Pipeline(make_model(codes), ids, None, titles, torch.arange(N), 3)
    held_out = HeldOut.of(Recommender(pipeline), [[str(n), str((n + 1) % N)] for n in range(N)])
    rows = [{"step": step, "split": "train", "loss": 2.0 - step} for step in (1, 2)]
    rows += [{"step": 2, "split": "valid", "recall@10": 0.5, "ndcg@10": 0.25}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 3, "spl')
    page.write_page(tmp_path / "page.html", "a <run>", pipeline, first_codes(pipeline), tmp_path, held_out)
    html = (tmp_path / "page.html").read_text()

    assert not re.search(r"<(script|link|img|iframe)[^>]*\b(src|href)=", html)
    head, body = html.split("</script>", 1)
    assert "a &lt;run&gt;" in body and len(head) > 10**6 and "<b>0" not in body.replace("<b>0</b>", "")
    [tree], frequencies, curves, calibration = charts(body)
    shown = [n for n in range(N - 1, 2, -1)]  # the most popular
    leaves = {tuple(map(int, key.split("-"))) for key, value in zip(tree["ids"], tree["values"], strict=True) if value}
    assert leaves == {tuple(codes[n].tolist()) for n in shown}
    assert set(tree["parents"]) <= {"", *tree["ids"]} and len(set(tree["ids"])) == len(tree["ids"])
    for key, parent in zip(tree["ids"], tree["parents"], strict=True):
        assert parent in ("", "root") or key.startswith(f"{parent}-")
    assert [sum(trace["y"]) for trace in frequencies] == [N] * 3
    assert [trace["name"] for trace in curves] == ["train loss", "valid loss", "recall@10", "ndcg@10"]
    assert curves[0]["y"] == [1.0, 0.0]
    assert len(calibration) == 2
    assert len(re.findall("<tr>", body)) == 1 + len(set(codes[:, 0].tolist())) + 1 + page.SAMPLES


def test_what_is_not_there_is_left_out(tmp_path):
    codes, sizes = random_catalogue(N, seed=1)
    ids = SemanticIds(codes, sizes, [str(n) for n in range(N)], "made", "0" * 16)
    pipeline = Pipeline(make_model(codes), ids, None, ["t"] * N, torch.zeros(N, dtype=torch.int64), 3)
    page.write_page(tmp_path / "page.html", "run", pipeline, first_codes(pipeline), None, None)
    html = (tmp_path / "page.html").read_text()
    assert len(charts(html)) == 2 and "Calibration</h2>" not in html and "Training</h2>" not in html
