"""Raw CSV files of MovieLens-32M's size to a cached corpus: time and peak memory, beside a plain pandas pipeline.

    python -m benchmarks.movielens_32m scratch/ml32m            # full size: 1 GB of files, deleted at the end
    python -m benchmarks.movielens_32m scratch/ml32m --scale .01

The files are drawn, not GroupLens': 32,000,204 ratings by 200,948 users of 87,585 movies and 2,000,072 tags; Zipf's law
for the movies, a log-normal for the users' activity, every user's ratings spread over a session of some hours.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import polars as pl

from data.processed import RecDataset, load_corpus

USERS, MOVIES, RATINGS, TAGS = 200_948, 87_585, 32_000_204, 2_000_072
GENRES = ["Action", "Adventure", "Animation", "Children", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"]


def generate(raw: Path, scale: float) -> None:
    """Writes movies.csv, ratings.csv and tags.csv."""
    draw = np.random.default_rng(0)
    users, movies = round(USERS * scale), round(MOVIES * scale)
    raw.mkdir(parents=True)
    movie_ids = np.sort(draw.choice(3 * movies, movies, replace=False) + 1)
    genres = ["|".join(draw.choice(GENRES, draw.integers(1, 4), replace=False)) for _ in range(movies)]
    titles = [f"The {n}. Movie, or: {n % 97} Nights (19{n % 100:02d})" for n in range(movies)]
    pl.DataFrame({"movieId": movie_ids, "title": titles, "genres": genres}).write_csv(raw / "movies.csv")

    popularity = 1 / np.arange(1, movies + 1) ** 0.9
    shuffled = draw.permutation(movie_ids)

    def some_movies(count: int) -> np.ndarray:
        return shuffled[
            np.searchsorted(np.cumsum(popularity) / popularity.sum(), draw.random(count)).clip(max=movies - 1)
        ]

    activity = draw.lognormal(4.3, 1.2, users)
    counts = np.maximum(1, np.floor(activity / activity.sum() * RATINGS * scale)).astype(np.int64)
    counts[counts.argmax()] += round(RATINGS * scale) - counts.sum()
    user = np.repeat(np.arange(1, users + 1), counts)
    start = np.repeat(draw.integers(800_000_000, 1_690_000_000, users), counts)
    columns = {
        "userId": user,
        "movieId": some_movies(len(user)),
        "rating": draw.integers(1, 11, len(user)) / 2,
        "timestamp": start + draw.integers(0, 20_000, len(user)),
    }
    pl.DataFrame(columns).write_csv(raw / "ratings.csv")
    n_tags = round(TAGS * scale)
    words = np.array([f"tag number {n}" for n in range(5000)])
    tags = {
        "userId": np.sort(draw.integers(1, users + 1, n_tags)),
        "movieId": some_movies(n_tags),
        "tag": words[(5000 * draw.random(n_tags) ** 3).astype(int)],
        "timestamp": draw.integers(1_100_000_000, 1_690_000_000, n_tags),
    }
    pl.DataFrame(tags).write_csv(raw / "tags.csv")


def with_pandas(raw: Path) -> dict:
    """What one would write in an afternoon: the same sequences and texts, saved as .npz and pickle."""
    import pandas as pd

    movies = pd.read_csv(raw / "movies.csv")
    ratings = pd.read_csv(raw / "ratings.csv").sort_values(["userId", "timestamp"], kind="stable")
    tags = pd.read_csv(raw / "tags.csv")
    row = pd.Series(np.arange(len(movies)), index=movies["movieId"])
    items = row[ratings["movieId"]].to_numpy()
    lengths = ratings.groupby("userId").size().to_numpy()
    tags["tag"] = tags["tag"].str.lower().str.strip()
    counts = tags.groupby(["movieId", "tag"]).size().reset_index(name="n")
    counts = counts.sort_values(["movieId", "n", "tag"], ascending=[True, False, True]).groupby("movieId").head(10)
    top = counts.groupby("movieId")["tag"].agg(", ".join)
    genres = movies["genres"].str.replace("|", ", ", regex=False)
    texts = movies["title"] + ". Genres: " + genres + ". Tags: " + movies["movieId"].map(top).fillna("") + "."
    np.savez(raw.parent / "pandas.npz", items=items.astype(np.int32), lengths=lengths, times=ratings["timestamp"])
    texts.to_pickle(raw.parent / "pandas.pkl")
    return {"users": len(lengths), "items": len(movies), "interactions": len(items)}


def with_this_project(folder: Path) -> dict:
    corpus = load_corpus(RecDataset.ML_32M, str(folder))
    return {"users": corpus.n_users, "items": corpus.n_items, "interactions": len(corpus.interactions)}


STEPS = {"build": with_this_project, "open": with_this_project, "pandas": lambda folder: with_pandas(folder / "raw")}


def measure(folder: Path, step: str) -> dict:
    """Runs a step in a process of its own; seconds without the imports, peak memory of all."""
    command = [sys.executable, "-m", "benchmarks.movielens_32m", str(folder), "--step", step]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="scratch folder; must not exist, is deleted at the end")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size")
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        start = time.perf_counter()
        counts = STEPS[arguments.step](arguments.folder)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(json.dumps({"seconds": seconds, "peak_gib": peak, **counts}))
        return
    if arguments.folder.exists():
        sys.exit(f"error: {arguments.folder} exists already")
    try:
        start = time.perf_counter()
        generate(arguments.folder / "raw", arguments.scale)
        size = sum(path.stat().st_size for path in (arguments.folder / "raw").iterdir())
        print(f"{size / 2**20:,.0f} MiB of CSV files written in {time.perf_counter() - start:.0f} s", flush=True)
        for step in STEPS:
            result = measure(arguments.folder, step)
            counts = ", ".join(f"{result[name]:,} {name}" for name in ("users", "items", "interactions"))
            print(f"{step:<7} {result['seconds']:7.2f} s  {result['peak_gib']:6.2f} GiB peak  {counts}", flush=True)
    finally:
        shutil.rmtree(arguments.folder, ignore_errors=True)


if __name__ == "__main__":
    main()
