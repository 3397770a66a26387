"""A look inside a trained retriever as one HTML page, which needs nothing beside it."""

import math
from collections import Counter, defaultdict
from html import escape
from itertools import cycle
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING

from torch import Tensor

from common.files import write_file
from modules.serving.inspection import MAX_RANKED, Calibration, Code, HeldOut, dashed
from modules.serving.pipeline import Pipeline
from training.plots import retriever_panels

if TYPE_CHECKING:
    import plotly.graph_objects as go

MAX_TILES = 3000  # items in the tree
TICKS = (0, 1, 3, 10, 30, 100, 300, 1000, 10_000)  # of its colours
SAMPLES, SHOWN, RECENT = 10, 5, 6  # histories on the page, items recommended for each, last items shown of each
COLOURS = ("#3b6fb6", "#d1603d", "#3f8f6b", "#8a63b0", "#b58a2a", "#5a6b7b", "#c0507f", "#2a9d9d")
AXIS = {"type": "log", "dtick": 1, "tickformat": "~%"}
STYLE = """
body { font: 16px/1.5 system-ui, "Open Sans", sans-serif; color: #1f2933 }
body { max-width: 1160px; margin: 2rem auto; padding: 0 1.5rem }
h1 { margin-bottom: 0 } h2 { margin: 2.5rem 0 .3rem } p { max-width: 50rem; color: #52606d; margin: .3rem 0 1rem }
table { border-collapse: collapse; width: 100%; font-size: 14px } .box { max-height: 440px; overflow-y: auto }
th, td { text-align: left; vertical-align: top; padding: .4rem .7rem; border-bottom: 1px solid #e4e7eb }
th { color: #52606d; position: sticky; top: 0; background: #fff } td ol { margin: 0; padding-left: 1.2rem }
td.number { text-align: right; font-variant-numeric: tabular-nums } .hit { font-weight: 600; color: #2a7a55 }
.dim { color: #7b8794 }
"""


def write_page(
    path: Path, title: str, pipeline: Pipeline, meanings: dict[int, Code], run: Path | None, held_out: HeldOut | None
) -> None:
    """meanings: see `modules.serving.inspection.first_codes`. run: the folder with metrics.jsonl. held_out: for sample
    histories and calibration. What is None is left out."""
    from plotly.offline import get_plotlyjs

    n_items, n_levels = pipeline.semantic_ids.codes.shape
    parts = [
        f"<h1>{escape(title)}</h1><p>{escape(pipeline.semantic_ids.corpus_name)}: {n_items:,} items, {n_levels} "
        f"levels of codes, {len(meanings):,} first codes in use.</p>",
        "<h2>Tree of IDs</h2><p>A tile for each first code, with what is typical of it; a click opens the tile, down "
        "to the items. The area is the number of items, the colour how often they occur in training.</p>",
        _chart(_tree(pipeline, meanings), left=0),
        "<h2>What first codes stand for</h2>" + _meanings(meanings),
        "<h2>How often codes occur</h2><p>Items of each code, the most frequent first: a curve for each level.</p>",
        _chart(_frequencies(pipeline.semantic_ids.codes)),
    ]
    if run:
        parts += ["<h2>Training</h2>", _chart(_curves(run))]
    if held_out:
        found = Calibration.of(held_out)
        parts += [
            "<h2>Held-out histories</h2><p>The last items of a history, what is recommended, and what came. A "
            "percentage is the probability that the item comes next.</p>",
            _histories(held_out),
            f"<h2>Calibration</h2><p>{_verdict(found, held_out)}</p>",
            _chart(_calibration(found)),
        ]
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    write_file(path, "\n".join([head, f"<script>{get_plotlyjs()}</script>", *parts, "</html>"]).encode())


def _chart(figure: "go.Figure", left: int = 70) -> str:
    figure.update_layout(template="plotly_white", colorway=COLOURS, margin={"l": left, "r": 20, "t": 30, "b": 55})
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False})


def _tree(pipeline: Pipeline, meanings: dict[int, Code]) -> "go.Figure":
    """A treemap of the most popular items, each below the prefixes that it shares with other items."""
    import plotly.graph_objects as go

    rows, keys = [tuple(row) for row in pipeline.semantic_ids.codes.tolist()], pipeline.semantic_ids.item_keys
    sizes = Counter(row[:depth] for row in rows for depth in range(1, len(row)))
    shown = pipeline.counts.argsort(descending=True, stable=True)[:MAX_TILES].tolist()
    root = (
        f"{len(rows):,} items" if len(rows) <= MAX_TILES else f"the {MAX_TILES:,} most popular of {len(rows):,} items"
    )
    tiles: dict[tuple, tuple] = {(): (root, None, root)}  # label, parent, and what a tile says if pointed at
    counts = defaultdict(list)
    for item in shown:
        row, parent = rows[item], ()
        counts[()].append(count := int(pipeline.counts[item]))
        for prefix in (row[:depth] for depth in range(1, len(row)) if sizes[row[:depth]] > 1):
            about = meanings[prefix[0]].typical[:3] if len(prefix) == 1 else [*wrap(pipeline.titles[item], 18), "…"]
            label = "<br>".join([f"<b>{dashed(prefix)}</b>", *map(escape, about)])
            tiles.setdefault(prefix, (label, parent, f"{sizes[prefix]:,} items"))
            counts[prefix].append(count)
            parent = prefix
        about = f"ID {dashed(row)}, key {escape(keys[item])}<br>{count:,} times in training"
        label = "<br>".join(map(escape, wrap(pipeline.titles[item], 18)))
        tiles[row], counts[row] = (label, parent, about), [count]
    labels, parents, hover = zip(*tiles.values(), strict=True)
    tree = go.Treemap(
        ids=[_id(prefix) for prefix in tiles],
        labels=labels,
        parents=["" if parent is None else _id(parent) for parent in parents],
        values=[int(len(prefix) == len(rows[0])) for prefix in tiles],
        text=hover,
        hovertemplate="%{label}<br>%{text}<extra></extra>",
        textinfo="label",
        maxdepth=2,
        tiling={"pad": 1},
        root={"color": "#f0f4f8"},
        marker={
            "colors": [math.log10(1 + sum(counts[prefix]) / len(counts[prefix])) for prefix in tiles],
            "colorscale": "Blues",
            "colorbar": {
                "title": "times in training,<br>mean of items",
                "tickvals": [math.log10(1 + n) for n in TICKS],
                "ticktext": TICKS,
            },
        },
    )
    return go.Figure(tree, {"height": 700})


def _id(prefix: tuple[int, ...]) -> str:
    return dashed(prefix) or "root"


def _meanings(meanings: dict[int, Code]) -> str:
    rows = [
        f'<tr><td class="number">{code}<td class="number">{of.n_items:,}<td>{escape(", ".join(of.typical))}'
        f'<td class="dim">{escape("; ".join(of.titles))}'
        for code, of in meanings.items()
    ]
    head = "<tr><th>code<th>items<th>typical<th>most popular"
    return f'<div class="box"><table>{head}{"".join(rows)}</table></div>'


def _frequencies(codes: Tensor) -> "go.Figure":
    import plotly.graph_objects as go

    figure = go.Figure()
    for level, column in enumerate(codes.T):
        counts, order = column.bincount().sort(descending=True)
        used, text = counts[counts > 0].tolist(), [f"code {code}" for code in order.tolist()]
        figure.add_scatter(y=used, text=text, name=f"level {level + 1}, {len(used):,} codes")
    figure.update_layout(height=380, hovermode="closest", xaxis_title="codes", yaxis_title="items")
    return figure.update_yaxes(type="log", dtick=1)


def _curves(run: Path) -> "go.Figure":
    from plotly.subplots import make_subplots

    panels = retriever_panels(run)
    figure = make_subplots(1, len(panels), subplot_titles=[title for title, _, _ in panels])
    for column, (_, rows, names) in enumerate(panels, 1):
        for colour, name in zip(cycle(COLOURS), names, strict=False):
            points = [(row["step"], row[name]) for row in rows if name in row]
            x, y = zip(*points, strict=True) if points else ((), ())
            style = {"mode": "lines+markers", "marker": {"size": 4, "color": colour}}
            figure.add_scatter(x=x, y=y, name=name, row=1, col=column, **style)
    return figure.update_xaxes(title="step").update_layout(height=400, hovermode="x")


def _histories(held_out: HeldOut) -> str:
    """A table of some histories, evenly among all."""
    recommender = held_out.recommender
    count = len(held_out.histories)
    chosen = [n * count // SAMPLES for n in range(SAMPLES)] if count > SAMPLES else list(range(count))
    ranked = recommender.rank([held_out.histories[n] for n in chosen], MAX_RANKED)
    rows = []
    for row, n in enumerate(chosen):
        keys, target = held_out.histories[n], int(held_out.targets[n])
        recent = [recommender.titles[recommender.index[key]] for key in keys[-RECENT:] if key in recommender.index]
        items, chances = ranked.items[row].tolist(), ranked.scores[row].exp().tolist()
        best = [
            f"<li{' class=hit' * (item == target)}>{escape(recommender.titles[item])} <span class=dim>{p:.1%}</span>"
            for item, p in zip(items[:SHOWN], chances, strict=False)
        ]
        place = f"not among the first {len(items):,}"
        if target in items:
            place = f"place {items.index(target) + 1:,}, {chances[items.index(target)]:.2%}"
        rows.append(
            f'<tr><td><span class="dim">{len(keys):,} items, the last:</span><br>{"<br>".join(map(escape, recent))}'
            f"<td><ol>{''.join(best)}</ol><td>{escape(recommender.titles[target])}<br><span class=dim>{place}</span>"
        )
    return f"<table><tr><th>history<th>recommended<th>what came{''.join(rows)}</table>"


def _verdict(found: Calibration, held_out: HeldOut) -> str:
    return (
        f"{len(held_out.targets):,} held-out histories. Together the ten best items of a history have a probability of "
        f"{found.top:.1%} in the mean; one of them came in {found.recall:.1%}. Each point stands for all pairs of "
        f"history and item of like probability, among the {MAX_RANKED:,} best items of each history, consumed ones "
        "included; on the line, predictions come true. Bars are 95 % intervals."
        + f" {held_out.left_out:,} more histories are unknown to the catalogue."
        * (held_out.left_out > 0)
    )


def _calibration(found: Calibration) -> "go.Figure":
    import plotly.graph_objects as go

    x, y = found.predicted.tolist(), found.came.tolist()
    bars = {"array": (found.high - found.came).tolist(), "arrayminus": (found.came - found.low).tolist()}
    pairs = [f"{n:,} pairs" for n in found.pairs.tolist()]
    figure = go.Figure()
    ends = [min(x, default=0.001) / 2, 1]
    figure.add_scatter(x=ends, y=ends, mode="lines", name="comes true", line={"color": "#9aa5b1", "dash": "dash"})
    figure.add_scatter(x=x, y=y, error_y=bars, text=pairs, mode="lines+markers", name="this retriever")
    figure.update_layout(height=520, width=700, xaxis_title="predicted probability", yaxis_title="share that came")
    return figure.update_xaxes(AXIS).update_yaxes(AXIS)
