"""Drawn data of MovieLens-32M's size, as its files or as a cached corpus, and the recall@10 of who knows the drawing.

    python -m benchmarks.movielens_32m out/ml32m                     # three CSV files in out/ml32m/raw
    python -m benchmarks.movielens_32m out/ml32m --scale .1 --cache  # the corpus itself, in out/ml32m/processed

`--gin 'train.dataset_folder = "out/ml32m"'` on configs/*_ml32m.gin trains with either; they make the same corpus.
At full size 200,948 users give 32,000,204 ratings to 87,585 movies, and 2,000,072 tags.

A movie is of one of 60 groups, and has a popularity and 8 followers, most of them of its group. A user has 6 groups and
is at one of them; they often go to another, and now and then exchange one of the 6. The next movie is, with probability
FOLLOW, a follower of one of the last 5; else one by popularity, with probability TASTE of the present group; of the
first NEW ones, one of the best known of all. Nobody rates a movie twice: a repeated one is drawn again, and after TRIES
tries any new one is taken. Genres and tags speak of the group.

Popularity, activity and the trivial baselines' recall are about those of MovieLens. The oracle ranks by these
probabilities and knows each user's present group, which no model can know for certain; below .5 from scale .1 on.

Figures of models refer to these constants and seed 0, so they stay as they are.
"""

import argparse
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.schemas import Interactions
from data.baselines import MostPopular, Transition
from data.corpus import Corpus
from data.ml32m import NO_GENRES
from data.splits import leave_one_out
from data.tags import Tags

USERS, MOVIES, RATINGS, TAGS = 200_948, 87_585, 32_000_204, 2_000_072
LEAST, MOST = 20, 0.35  # ratings of a user: at least so many, and of this share of the movies at most
GROUPS, HOMES, MOVE, EXCHANGE = 60, 6, 0.1, 0.01
FOLLOW, TASTE, NEW, TRIES = 0.45, 0.75, 15, 8
LAGS = np.full(5, 0.2)  # probabilities of the last movie, the one before, ..
FOLLOWERS = 0.65 ** np.arange(8) / (0.65 ** np.arange(8)).sum()  # of the first follower, the second, ..
KNOWN, POPULARITY = (0.14, 2), (0.15, 10)  # a, b: the movie of rank r has the weight exp(-a log(1 + r / b)^2)
GENRES = (
    "Action Adventure Animation Children Comedy Crime Documentary Drama Fantasy Film-Noir Horror IMAX Musical Mystery "
    "Romance Sci-Fi Thriller War Western"
).split()
GROUP_TAGS, COMMON_TAGS = 25, 1000
WORDS = sorted(a + b + c + d for a in "bdfgklmnprstvz" for b in "aeiou" for c in "dklmnprstv" for d in "aeiou")
ORACLE_USERS = 5000


@dataclass
class World:
    """N movies in the order of their groups.

    group: [N]. known, popularity: [N + 1], the sums of the weights before each movie, the last one 1. borders:
    [GROUPS + 1], the sums of the popularity before each group. followers: [N, 8], the same one twice if it so happens.
    """

    group: np.ndarray
    known: np.ndarray
    popularity: np.ndarray
    borders: np.ndarray
    followers: np.ndarray


def draw_world(movies: int, draw: np.random.Generator) -> World:
    rank, sizes = draw.permutation(movies), 1 / np.sqrt(5 + np.arange(GROUPS))
    group = np.sort(draw.choice(GROUPS, movies, p=sizes / sizes.sum()))
    weights = (np.exp(-a * np.log1p(rank / b) ** 2).cumsum() for a, b in (KNOWN, POPULARITY))
    known, popularity = (np.append(0, sums / sums[-1]) for sums in weights)
    world = World(group, known, popularity, popularity[np.searchsorted(group, np.arange(GROUPS + 1))], np.empty(0))
    near = np.where(draw.random((movies, len(FOLLOWERS))) < 0.8, group[:, None], GROUPS)
    world.followers = by_popularity(world, near, draw).astype(np.int32)
    return world


def by_popularity(world: World, group: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """For each group a movie of it, or of all for group number GROUPS; the same shape."""
    low, high = np.append(world.borders[:-1], 0.0), np.append(world.borders[1:], 1.0)
    place = low[group] + draw.random(group.shape) * (high - low)[group]
    return np.searchsorted(world.popularity, place, side="right").clip(1, len(world.group)) - 1


def draw_activity(users: int, movies: int, ratings: int, draw: np.random.Generator) -> np.ndarray:
    """[U] numbers of ratings with that sum: LEAST and a log-normal part, which is scaled by bisection."""
    most, more, low, high = int(MOST * movies), draw.lognormal(0, 1.39, users), 0.0, float(movies)
    for _ in range(60):
        scale = (low + high) / 2
        counts = np.minimum(LEAST + (scale * more).astype(np.int64), most)
        low, high = (scale, high) if counts.sum() <= ratings else (low, scale)
    counts = np.minimum(LEAST + (low * more).astype(np.int64), most)
    counts[np.flatnonzero(counts < most)[: ratings - counts.sum()]] += 1
    return counts


def draw_histories(world: World, counts: np.ndarray, draw: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Movies [T] int32, user after user, and the group that each user was at for the last one, [U]. counts: [U]."""
    movies, starts = np.empty(counts.sum(), np.int32), np.cumsum(counts) - counts
    present, order = np.empty(len(counts), np.int64), np.argsort(-counts, kind="stable")
    for users in np.array_split(order, 1 + len(counts) * len(world.group) // 2**28):  # of about equal activity
        lengths, first, consumed = counts[users], starts[users], np.zeros((len(users), len(world.group)), bool)
        homes = world.group[by_popularity(world, np.full((len(users), HOMES), GROUPS), draw)]
        at = homes[:, 0].copy()
        for step in range(lengths[0]):
            active = np.arange(np.searchsorted(-lengths, -step))  # longer than `step`
            changed = active[draw.random(len(active)) < EXCHANGE]
            group = world.group[by_popularity(world, np.full(len(changed), GROUPS), draw)]
            homes[changed, draw.integers(HOMES, size=len(changed))] = group
            moved = active[draw.random(len(active)) < MOVE]
            at[moved] = homes[moved, draw.integers(HOMES, size=len(moved))]
            tries = 0
            while len(active):
                if tries < TRIES:
                    found = draw_next(world, movies, first[active], step, at[active], draw)
                else:
                    found = draw.integers(len(world.group), size=len(active))
                new = ~consumed[active, found]
                movies[first[active[new]] + step] = found[new]
                consumed[active[new], found[new]] = True
                active, tries = active[~new], tries + 1
        present[users] = at
    return movies, present


def draw_next(
    world: World, movies: np.ndarray, first: np.ndarray, step: int, at: np.ndarray, draw: np.random.Generator
) -> np.ndarray:
    """A movie, consumed or not, for M users with `step` movies from movies[first] on who are at a group: 3 x [M]."""
    if step < NEW:
        found = np.searchsorted(world.known, draw.random(len(first)), side="right") - 1
    else:
        group = np.where(draw.random(len(first)) < TASTE, at, GROUPS)
        found = by_popularity(world, group, draw)
    follows = np.flatnonzero(draw.random(len(first)) < (FOLLOW if step else 0))
    lag, which = (np.searchsorted(p.cumsum()[:-1], draw.random(len(follows)), side="right") for p in (LAGS, FOLLOWERS))
    found[follows] = world.followers[movies[first[follows] + np.maximum(step - 1 - lag, 0)], which]
    return found


def oracle(world: World, movies: np.ndarray, counts: np.ndarray, present: np.ndarray, users: np.ndarray) -> list:
    """Recall@10 of the last movie of those users by the probabilities of `draw_next`, and what these expect of it."""
    popularity, starts, found = np.diff(world.popularity), np.cumsum(counts) - counts, []
    for user in users:
        *history, target = movies[starts[user] : starts[user] + counts[user]]
        of_group = np.where(world.group == present[user], popularity / np.diff(world.borders)[present[user]], 0)
        scores = (1 - FOLLOW) * (TASTE * of_group + (1 - TASTE) * popularity)
        np.add.at(scores, world.followers[history[: -1 - len(LAGS) : -1]], FOLLOW * LAGS[:, None] * FOLLOWERS)
        scores[history] = 0
        best = np.argpartition(-scores, 10)[:10]
        found.append((target in best, scores[best].sum() / scores.sum()))
    return np.mean(found, 0).tolist()


def draw_times(counts: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """[T] int64 seconds that rise within a user: some a minute, and days between sessions."""
    steps = 1 + draw.exponential(20, counts.sum()).astype(np.int64)
    pauses = np.flatnonzero(draw.random(len(steps)) < 0.02)
    steps[pauses] += draw.exponential(10 * 86_400, len(pauses)).astype(np.int64)
    times, starts = steps.cumsum(), np.cumsum(counts) - counts
    return times + np.repeat(draw.integers(820_000_000, 1_600_000_000, len(counts)) - times[starts], counts)


def draw_genres(group: np.ndarray, draw: np.random.Generator) -> list[list[str]]:
    """Of each movie: most of the three of its group, seldom others. group: [N]."""
    chances = np.full((GROUPS, len(GENRES)), 0.02)
    np.put_along_axis(chances, draw.random(chances.shape).argsort(1)[:, :3], 0.6, axis=1)
    return [[GENRES[n] for n in row.nonzero()[0]] for row in draw.random((len(group), len(GENRES))) < chances[group]]


def draw_tags(group: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """[M] numbers of words for movies of those groups [M]: most are of the group's 25, others common to all."""
    own = group * GROUP_TAGS + (GROUP_TAGS * draw.random(len(group)) ** 2).astype(np.int64)
    common = GROUPS * GROUP_TAGS + (COMMON_TAGS * draw.random(len(group)) ** 3).astype(np.int64)
    return draw.permutation(len(WORDS))[np.where(draw.random(len(group)) < 0.7, own, common)]


@dataclass(frozen=True)
class Drawn:
    """movie_ids: [N], rising; rows of genres (lists of names) and titles fit. counts: [U] ratings of user 1, 2, ..;
    items, times: [T], rows of movies and seconds. tagged, tags: [M] rows of movies and numbers of WORDS.
    recall: recall@10 of the last ratings by most popular, transition and the oracle, all items ranked."""

    movie_ids: np.ndarray
    titles: list[str]
    genres: list[list[str]]
    counts: np.ndarray
    items: np.ndarray
    times: np.ndarray
    tagged: np.ndarray
    tags: np.ndarray
    recall: dict[str, float]


def draw_data(scale: float, seed: int = 0) -> Drawn:
    users, movies, ratings, n_tags = (round(scale * size) for size in (USERS, MOVIES, RATINGS, TAGS))
    draw = np.random.default_rng(seed)
    world, counts = draw_world(movies, draw), draw_activity(users, movies, ratings, draw)
    drawn, present = draw_histories(world, counts, draw)
    some = draw.choice(users, min(users, ORACLE_USERS), replace=False)
    best, expected = oracle(world, drawn, counts, present, some)
    row = draw.permutation(movies).astype(np.int32)  # of each movie in the catalogue
    group, items = world.group[row.argsort()], row[drawn]
    recall = {**baselines(items, counts, movies), "oracle": best, "oracle, expected": expected}
    movie_ids = np.sort(draw.choice(3 * movies, movies, replace=False) + 1)
    years = draw.integers(1930, 2024, movies)
    titles = [f"Film {number} ({year})" for number, year in zip(movie_ids, years, strict=True)]
    tagged = row[by_popularity(world, np.full(n_tags, GROUPS), draw)]
    times, genres, tags = draw_times(counts, draw), draw_genres(group, draw), draw_tags(group[tagged], draw)
    return Drawn(movie_ids, titles, genres, counts, items, times, tagged, tags, recall)


def interactions(items: np.ndarray, counts: np.ndarray, times: np.ndarray | None = None) -> Interactions:
    offsets = torch.from_numpy(np.append(0, counts.cumsum()))
    return Interactions(torch.from_numpy(items), offsets, None if times is None else torch.from_numpy(times))


def baselines(items: np.ndarray, counts: np.ndarray, n_items: int) -> dict[str, float]:
    """recall@10 of the last item of each user, all items ranked."""
    splits = leave_one_out(interactions(items, counts))
    ends, items = splits.interactions.offsets[1:], splits.interactions.items
    last, target = items[ends - 2].long(), items[ends - 1].long()
    fitted = (kind(splits.interactions, splits.train_lengths, n_items) for kind in (MostPopular, Transition))
    return {type(one).__name__: (one.places(last, target) < 10).double().mean().item() for one in fitted}


def write_files(data: Drawn, folder: Path) -> None:
    """movies.csv, ratings.csv and tags.csv as GroupLens has them: ratings by user and movie, not by time."""
    import polars as pl

    folder.mkdir(parents=True)
    genres = ["|".join(names) or NO_GENRES for names in data.genres]
    draw, users = np.random.default_rng(0), len(data.counts)
    pl.DataFrame({"movieId": data.movie_ids, "title": data.titles, "genres": genres}).write_csv(folder / "movies.csv")
    user = np.repeat(np.arange(1, users + 1, dtype=np.int32), data.counts)
    columns = {"userId": user, "movieId": data.movie_ids[data.items], "timestamp": data.times}
    stars = pl.Series("rating", draw.integers(1, 11, len(data.items)) / 2)
    ratings = pl.DataFrame(columns).sort("userId", "movieId").insert_column(2, stars)
    ratings.write_csv(folder / "ratings.csv")
    by, times = draw_taggers(data)
    tags = {"userId": by + 1, "movieId": data.movie_ids[data.tagged], "tag": np.array(WORDS)[data.tags]}
    pl.DataFrame(tags | {"timestamp": times}).write_csv(folder / "tags.csv")


def draw_taggers(data: Drawn) -> tuple[np.ndarray, np.ndarray]:
    """Who gave each tag, from 0, and when: [M], [M]."""
    draw = np.random.default_rng(1)
    users = np.sort(draw.integers(0, len(data.counts), len(data.tags)))
    return users, draw.integers(1_140_000_000, 1_690_000_000, len(data.tags))


def corpus(data: Drawn) -> Corpus:
    """What `data.ml32m.read_movielens` makes of the files."""
    users, times = draw_taggers(data)
    names, places = np.unique(np.array(WORDS)[data.tags], return_inverse=True)
    order = places.argsort(kind="stable")
    columns = np.stack([users, data.tagged, places, times])[:, order].astype(np.int64)
    user, item, name, time = map(torch.as_tensor, np.ascontiguousarray(columns))
    texts = []
    for title, genres in zip(data.titles, data.genres, strict=True):
        texts.append(f"{title}. Genres: {', '.join(genres)}." if genres else f"{title}.")
    return Corpus.build(
        "ml32m",
        interactions(data.items, data.counts, data.times),
        item_keys=data.movie_ids.astype(str).tolist(),
        user_keys=np.arange(1, len(data.counts) + 1).astype(str).tolist(),
        texts=texts,
        categories=data.genres,
        tags=Tags(user, item, name, time, names.tolist()),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a dataset folder; `raw` or `processed` in it must not exist")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the full size, .01 to 1")
    parser.add_argument("--cache", action="store_true", help="write the corpus itself instead of its CSV files")
    arguments = parser.parse_args()
    target = arguments.folder / ("processed/ml32m" if arguments.cache else "raw")
    if not 0.01 <= arguments.scale <= 1:
        sys.exit(f"error: --scale must be .01 to 1, not {arguments.scale}")
    if target.exists():
        sys.exit(f"error: {target} exists already: delete it, or name another folder")
    start = time.perf_counter()
    data = draw_data(arguments.scale)
    print(f"{len(data.items):,} ratings by {len(data.counts):,} users of {len(data.titles):,} movies; recall@10:")
    print(*(f"  {name:<18} {value:.4f}" for name, value in data.recall.items()), sep="\n")
    drawn = time.perf_counter() - start
    if arguments.cache:
        corpus(data).save(target)
    else:
        write_files(data, target)
    written, peak = time.perf_counter() - start - drawn, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"drawn in {drawn:.0f} s, written to {target} in {written:.0f} s, {peak:.1f} GiB at most")


if __name__ == "__main__":
    main()
