"""From a trained run to files of recommendations, by the script and in Python."""

import csv
import gc
import json
import os
import shutil
import subprocess
import sys

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

import recommend
from data.batches import SequenceSource
from data.corpus import Corpus
from data.splits import draw_splits, in_training
from modules.model import EncoderDecoderRetrievalModel
from modules.serving.pipeline import Pipeline
from modules.serving.recommender import Recommender
from modules.tokenizer.semids import SemanticIds, load_item_features
from modules.tokenizer.tokenizer import Tokenizer
from modules.tree import Tree
from tests.data.test_histories import ROWS, write_histories
from tests.pipeline import COLOURS, N_ITEMS, REPOSITORY
from tests.training.test_evaluate import stub
from training.evaluate import Evaluation

MAX_ITEMS = 20


@pytest.fixture(scope="module")
def corpus(trained):
    return Corpus.load(trained / "processed" / "amazon_beauty")


@pytest.fixture(scope="module")
def pipeline(trained, corpus, tmp_path_factory):
    """The folder, away from the run."""
    ids = SemanticIds.load(trained / "out" / "rqvae")
    features = load_item_features(trained / "out" / "rqvae", None, ids)
    tree = Tree.build(ids.codes, ids.level_sizes)
    model = trained / "out" / "decoder" / "pipeline"
    model = EncoderDecoderRetrievalModel.from_pretrained(model, tree, torch.from_numpy(features))
    splits = draw_splits("leave-one-out", corpus.interactions)
    items = corpus.interactions.items[in_training(splits.interactions, splits.train_lengths)]
    folder = tmp_path_factory.mktemp("elsewhere") / "pipeline"
    counts = torch.bincount(items, minlength=N_ITEMS)
    columns = corpus.columns(["categories"])
    tokenizer = Tokenizer.found(trained / "out" / "rqvae")
    Pipeline(model, ids, features, corpus.titles(), counts, MAX_ITEMS, tokenizer, columns).save(folder)
    return folder


@pytest.fixture(scope="module")
def histories(corpus) -> list[list[str]]:
    """What every user of the corpus consumed but the last item."""
    rows = corpus.interactions.items.split(corpus.interactions.offsets.diff().tolist())
    return [[corpus.item_keys[n] for n in row.tolist()[:-1]] for row in rows]


@pytest.fixture
def script(monkeypatch, capsys):
    """Runs recommend.py in this process: exit status or message, standard output, standard error."""

    def run(*arguments) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["recommend.py", *map(str, arguments)])
        try:
            status = recommend.main()
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return run


def test_it_ranks_as_the_evaluation_of_the_test_split_does(pipeline, corpus, histories):
    recommender = Recommender.from_pretrained(pipeline)
    splits = draw_splits("leave-one-out", corpus.interactions)
    source = SequenceSource(splits.interactions, splits.test, MAX_ITEMS, torch.device("cpu"))
    evaluation = Evaluation(recommender.model, 10, True, 64, stub("cpu"), recorded=False)
    for new in (False, True):
        ranked = recommender.rank(histories, 10, exclude_seen=new)
        assert torch.equal(ranked.items, evaluation.lists(source, 10, new))
    title = corpus.texts()[int(ranked.items[0, 0])].partition(".")[0]
    assert recommender.recommend(histories[:1])[0].items[0].title == title


def test_a_copy_of_the_folder_recommends_the_same(pipeline, histories, tmp_path):
    shutil.copytree(pipeline, tmp_path / "run" / "pipeline")
    one, other = (Recommender.from_pretrained(path).rank(histories) for path in (pipeline, tmp_path / "run"))
    assert torch.equal(one.items, other.items) and torch.equal(one.scores, other.scores)


def test_a_missing_damaged_or_foreign_file_is_named(pipeline, tmp_path):
    for name, content in (
        ("model.safetensors", None),
        ("features.npy", b"x"),
        ("semantic_ids.safetensors", b""),
        ("config.json", b"{}"),
    ):
        folder = shutil.copytree(pipeline, tmp_path / name)
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)
        error = FileNotFoundError if content is None else ValueError
        with pytest.raises(error, match=f"{folder / name} is {'missing' if content is None else 'damaged'}"):
            Recommender.from_pretrained(folder)
    header = json.loads((pipeline / "pipeline.json").read_text())
    for content, message in (
        (json.dumps(header | {"format": "pipeline-9"}), "has the format 'pipeline-9', this code reads 'pipeline-1'"),
        (json.dumps(header | {"files": {"../other": "0"}}), "does not name the files"),
        (json.dumps(header | {"max_items": -3}), "pipeline.json is damaged"),
        ("[", "pipeline.json is damaged"),
    ):
        (folder / "pipeline.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            Recommender.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="no pipeline in .*train_decoder.py"):
        Recommender.from_pretrained(tmp_path)
    columns = {f"categories.{part}" for part in ("data", "offsets", "lengths")}
    assert load_file(pipeline / "catalogue.safetensors").keys() == {"title_data", "title_offsets", "counts"} | columns


def test_a_hub_repository_recommends_the_same(pipeline, histories, hub):
    files = {str(path.relative_to(pipeline)): path.read_bytes() for path in pipeline.rglob("*.*")}
    hub.repositories["me/shop"] = {"v2": files, "main": {name: files[name] for name in files if name != "config.json"}}
    one, other = (Recommender.from_pretrained(*at).rank(histories[:9]) for at in ((pipeline,), ("me/shop", "v2")))
    assert torch.equal(one.items, other.items) and torch.equal(one.scores, other.scores)
    with pytest.raises(FileNotFoundError, match="no config.json in the Hub repository 'me/shop'"):
        Recommender.from_pretrained("me/shop")
    hub.repositories["me/shop"]["main"] = files | {"config.json": b"{}"}
    with pytest.raises(ValueError, match="config.json is damaged.* delete .*models--me--shop to fetch it again"):
        Recommender.from_pretrained("me/shop")


def test_nothing_grows_over_many_calls(pipeline, histories):
    recommender = Recommender.from_pretrained(pipeline)
    before = None
    for n in range(60):
        recommender.recommend(histories[n : n + 1 + n % 7], k=n % 9 + 1, block=histories[n])
        if n == 9:
            before = {name: id(value) for name, value in vars(recommender).items()}
            tensors = n_tensors()
    assert {name: id(value) for name, value in vars(recommender).items()} == before
    assert n_tensors() <= tensors


def n_tensors() -> int:
    gc.collect()
    return sum(type(value) is torch.Tensor for value in gc.get_objects())


def read(path) -> list[tuple]:
    if path.suffix == ".parquet":
        rows = pl.read_parquet(path).to_dicts()
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
    else:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","))
        for row in rows:
            row |= {"semantic_id": [int(code) for code in row["semantic_id"].split("-")]}
            row |= {"rank": int(row["rank"]), "score": float(row["score"]), "popular": row["popular"] == "true"}
    names = ("user", "rank", "item", "title", "semantic_id", "popular")
    return [(*(row[name] for name in names), pytest.approx(row["score"])) for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_the_script_writes_what_the_recommender_says(suffix, pipeline, tmp_path, script):
    allowed = [f"item{n:02d}" for n in range(5)]
    (tmp_path / "allow.txt").write_text("\n".join([*allowed, "", "other"]))
    histories, out = write_histories(tmp_path, "lists .jsonl"), tmp_path / "new" / f"out{suffix}"
    status, printed, warned = script(
        pipeline, "--histories", histories, "--out", out, "--k", 4, "--allow", tmp_path / "allow.txt"
    )
    assert status is None, status
    assert "3 histories" in printed and "1 of 5 items" in printed and "1 histories without" in printed
    assert "1 of 6 keys are not in the catalogue" in warned
    expected = []
    found = Recommender.from_pretrained(pipeline).recommend(list(ROWS.values()), 4, allow=allowed)
    for user, row in zip(ROWS, found, strict=True):
        assert len(row.items) == 4
        for rank, item in enumerate(row.items, 1):
            expected.append((user, rank, item.key, item.title, list(item.semantic_id), row.popular, item.score))
    assert read(out) == expected
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_predicates_filter_by_the_columns_of_the_pipeline(pipeline, script):
    filters = "--allow", "categories = LAMP", "--block", "title contains red"
    status, printed, _ = script(pipeline, "--items", "item01", *filters)
    assert status is None and "none" not in printed
    titles = {line.split("  ")[-2].strip() for line in printed.splitlines()[3:]}
    assert titles == {f"{colour} lamp" for colour in COLOURS[1:]}


def test_two_processes_write_one_table_in_order(pipeline, histories, tmp_path):
    """More histories than a chunk of both, the last chunk of one history, and one without a known item."""
    rows = [*histories[:6], ["unknown"]]
    (tmp_path / "h.jsonl").write_text("".join(f"{json.dumps({'user': n, 'items': r})}\n" for n, r in enumerate(rows)))
    code = "import recommend; recommend.CHUNKS = {'cpu': 3}; recommend.main()"
    (tmp_path / "script.py").write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    arguments = [str(pipeline), "--histories", str(tmp_path / "h.jsonl"), "--device", "cpu", "--out"]
    for start, out in (([sys.executable], "one.csv"), (launcher, "two.csv")):
        command = [*start, str(tmp_path / "script.py"), *arguments, str(tmp_path / out)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("7 histories") == 1 and "1 histories without" in done.stdout
    assert read(tmp_path / "two.csv") == read(tmp_path / "one.csv")
    assert {path.name for path in tmp_path.iterdir()} == {"h.jsonl", "script.py", "one.csv", "two.csv"}


def test_json_lines_need_no_polars(pipeline, tmp_path):
    arguments = ["x", str(pipeline), "--histories", str(write_histories(tmp_path, "lists .jsonl"))]
    arguments += ["--out", str(tmp_path / "out.jsonl"), "--users", "7"]
    code = f"import sys; sys.modules['polars'] = None; sys.argv = {arguments}; import recommend; recommend.main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {row[0] for row in read(tmp_path / "out.jsonl")} == {"7"}


def test_typed_items_print_titles(pipeline, script):
    status, printed, _ = script(pipeline, "--items", "item01", "none", "--include-seen", "--k", 3)
    assert status is None, status
    lines = printed.splitlines()
    assert "green ball" in lines[1] and "not in the catalogue" in lines[2] and len(lines) == 7
    assert "item08" in lines[4]  # seven steps on


def test_bad_input_is_one_line(pipeline, tmp_path, script):
    histories, none = write_histories(tmp_path, "lists .csv"), tmp_path / "none.csv"
    (blank := tmp_path / "blank.txt").write_text("\n \n")
    for arguments, message in (
        ([tmp_path / "none", "--items", "1"], "no file or folder"),
        ([pipeline, "--histories", none, "--out", tmp_path / "o.csv"], f"error: {none} is missing"),
        ([pipeline, "--histories", histories, "--out", tmp_path / "o.doc"], "o.doc: the file name must end"),
        (
            [pipeline, "--histories", histories, "--out", tmp_path / "o.csv", "--users", "z"],
            f"is in {histories}, such as z.",
        ),
        ([pipeline, "--histories", histories, "--out", histories], "would take the place of the histories"),
        ([pipeline, "--histories", histories, "--out", histories / "o.csv"], f"{histories}: there is a file where a"),
        ([pipeline, "--items", "1", "--k", "0"], "k = 0 must be a whole number, 1 or more."),
        ([pipeline, "--items", "1", "--cold-bonus", "nan"], "cold_bonus = nan must be a finite number."),
        ([pipeline, "--items", "1", "--allow", blank], f"--allow {blank}: the file holds no key; write one per line"),
        ([pipeline, "--items", "1", "--allow", tmp_path], "is neither a file nor a predicate"),
    ):
        status, _, error = script(*arguments)
        assert status == 1 and error.startswith("error: ") and message in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {histories.name, blank.name}
    for name, values in (("users", ["1"]), ("columns", ["a", "b", "c"])):
        status, _, error = script(pipeline, "--items", "1", f"--{name}", *values)
        assert status == 2 and f"--{name} belongs to --histories" in error


def test_users_who_are_not_found_and_who_get_nothing_are_told(pipeline, tmp_path, script):
    histories, out = write_histories(tmp_path, "lists .csv"), tmp_path / "out.csv"
    (tmp_path / "allow.txt").write_text("item01")
    asked = ["--users", "a", "b", "z", "y", "--allow", tmp_path / "allow.txt"]
    status, printed, warned = script(pipeline, "--histories", histories, "--out", out, *asked)
    assert (
        status is None
        and "2 histories -> " in printed
        and printed.endswith("and 1 got nothing, as no item was left.\n")
    )
    assert warned == f"warning: {histories} lacks 2 of the users asked for, such as y, z\n"
    assert {row[0] for row in read(out)} == {"b"}


def test_keys_that_are_all_unknown_are_shown_as_they_were_read(pipeline, tmp_path, script):
    (path := tmp_path / "h.csv").write_text("user,items\na,\nb,item01 item02\nc,item03 item04\n")
    status, _, warned = script(pipeline, "--histories", path, "--out", tmp_path / "out.csv")
    assert status is None and warned == (
        f"warning: {path}: no item's key is in the catalogue: the first is 'item01 item02', the catalogue has keys "
        "like 'item00'. Keys in a text have | between them.\n"
    )


def test_a_data_set_that_was_trained_on_gives_its_users_histories(pipeline, trained, corpus, tmp_path, script):
    users, out = corpus.user_keys[3:5], tmp_path / "out.jsonl"
    for folder in (trained, trained / "processed" / "amazon_beauty"):
        status, printed, warned = script(pipeline, "--histories", folder, "--out", out, "--k", 3, "--users", *users)
        assert status is None and not warned and "2 histories" in printed
        rows = corpus.interactions.items.split(corpus.interactions.offsets.diff().tolist())[3:5]
        keys = [[corpus.item_keys[n] for n in row] for row in rows]
        found = Recommender.from_pretrained(pipeline).recommend(keys, 3)
        expected = [(user, item.key) for user, row in zip(users, found, strict=True) for item in row.items]
        assert [(user, item) for user, _, item, *_ in read(out)] == expected
