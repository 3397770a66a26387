import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

import train_decoder
from data.batches import SequenceSource
from data.processed import RecDataset
from modules.model import EncoderDecoderRetrievalModel
from modules.serving.pipeline import Pipeline
from modules.serving.recommender import Recommender
from modules.tokenizer.semids import SemanticIds, load_item_features
from modules.tree import Tree
from tests.pipeline import N_ITEMS, THINGS, TIGER, launch, lines, run, write_raw
from training.sharded import ShardedAdamW


def test_the_pipeline_learns_what_follows_from_the_last_item(trained):
    metrics = json.loads((trained / "out" / "decoder" / "metrics.json").read_text())
    assert metrics["test/recall@1"] > 0.9
    assert metrics["test/ndcg@10"] > 0.9
    assert metrics["test/most_popular/all/recall@1"] < 0.3
    assert metrics["test/transition/all/recall@1"] > 0.9
    for row in ("tree", "items", "fused", "beams"):
        assert metrics[f"test/{row}/all/recall@1"] > 0.8 and metrics[f"test/{row}/new/recall@1"] > 0.8
    assert metrics["test/recall@1"] == metrics["test/fused/all/recall@1"]


def test_the_run_folder_keeps_the_contract(trained):
    root = trained / "out" / "decoder"
    assert {path.name for path in root.iterdir()} == {
        ".lock",
        "config.gin",
        "metrics.jsonl",
        "metrics.json",
        "ranks.safetensors",
        "held_out.jsonl",
        "checkpoints",
        "plots",
        "pipeline",
    }
    best = (root / "checkpoints" / "BEST").read_text().strip()
    model = load_file(root / "pipeline" / "model.safetensors")
    saved = load_file(root / "checkpoints" / best / "model.safetensors")
    assert all(torch.equal(model[name], saved[name]) for name in model)
    ids = SemanticIds.load(trained / "out" / "rqvae")
    features = torch.from_numpy(load_item_features(trained / "out" / "rqvae", None, ids))
    loaded = EncoderDecoderRetrievalModel.from_pretrained(
        root / "pipeline", Tree.build(ids.codes, ids.level_sizes), features
    )
    metrics = json.loads((root / "metrics.json").read_text())
    assert float(loaded.item_share) == pytest.approx(metrics["valid/item_share"])
    assert Pipeline.load(root).columns == {"categories": [[THINGS[n // 6]] for n in range(N_ITEMS)]}
    ranks = load_file(root / "ranks.safetensors")["fused/all"]
    assert float((ranks < 5).double().mean()) == pytest.approx(metrics["test/recall@5"])
    assert {row["split"] for row in lines(root / "metrics.jsonl")} == {"train", "valid"}
    kept = {path.name for path in (root / "checkpoints").glob("step_*")}
    assert kept >= {best, "step_00000250", "step_00000275", "step_00000300"} and len(kept) <= 4
    assert (root / "checkpoints" / "LAST").read_text().strip() == "step_00000300"


def test_the_test_split_is_read_once_after_training(trained, tmp_path, monkeypatch):
    seen = []
    original = SequenceSource.plans

    def recorded(self, *args):
        seen.append(int(self.samples.position.sum()))
        return original(self, *args)

    monkeypatch.setattr(SequenceSource, "plans", recorded)
    run(trained, "decoder", "train.iterations = 20", f'train.save_dir_root = "{tmp_path}"')
    test_sum = max(seen)  # test positions lie one after the validation positions
    once = [True] * 5  # two baselines, the model's ranks, those of its beams, and its lists
    assert [total == test_sum for total in seen] == [False] * (len(seen) - 5) + once


def test_the_same_config_gives_the_same_run(trained, tmp_path):
    first = run(trained, "decoder", "train.iterations = 30", f'train.save_dir_root = "{tmp_path}/a"')
    second = run(trained, "decoder", "train.iterations = 30", f'train.save_dir_root = "{tmp_path}/b"')
    assert first == second
    assert lines(tmp_path / "a" / "metrics.jsonl") == lines(tmp_path / "b" / "metrics.jsonl")


def test_tigers_layout_learns_what_follows(trained, tmp_path):
    metrics = run(trained, "decoder", *TIGER, f'train.save_dir_root = "{tmp_path}/run"')
    assert metrics["test/recall@1"] > 0.8 and "test/items/all/recall@1" not in metrics


def test_the_item_head_alone_trains_and_is_reported(trained, tmp_path):
    alone = ("EncoderDecoderRetrievalModel.tree_loss = 0.0", 'EncoderDecoderRetrievalModel.item_parts = ("free",)')
    metrics = run(trained, "decoder", *alone, f'train.save_dir_root = "{tmp_path}/run"')
    assert metrics["test/items/all/recall@1"] > 0.8 and metrics["valid/item_share"] == 1.0
    assert not [name for name in metrics if name.startswith(("test/tree/", "test/beams/", "test/fused/"))]
    with pytest.raises(ValueError, match=r"train.exact = False searches the tree"):
        run(trained, "decoder", *alone, "train.exact = False", f'train.save_dir_root = "{tmp_path}/wrong"')


def test_what_cannot_be_is_refused_before_training(trained, tmp_path):
    folder = f'train.save_dir_root = "{tmp_path}/run"'
    with pytest.raises(ValueError, match=r"decoder_layers = 0: set train.exact = False"):
        run(trained, "decoder", "EncoderDecoderRetrievalModel.decoder_layers = 1", folder)
    with pytest.raises(ValueError, match=r"set train.every_position = True"):
        run(trained, "decoder", "train.sasrec_baseline = True", "train.every_position = False", folder)


def test_training_ends_when_validation_no_longer_improves_and_does_not_go_on(trained, tmp_path, monkeypatch):
    extra = ("train.full_eval_every = 50", "train.patience = 2", "train.iterations = 2000")
    extra += ("train.save_model_every = 0",)
    metrics = run(trained, "decoder", *extra, f'train.save_dir_root = "{tmp_path}/run"')
    log = lines(tmp_path / "run" / "metrics.jsonl")
    assert max(row["step"] for row in log) == metrics["valid/step"] + 100 < 2000
    assert metrics["valid/ndcg@10"] == max(row["ndcg@10"] for row in log if "ndcg@10" in row)
    monkeypatch.setattr(ShardedAdamW, "update", None)  # a run that has ended makes no more steps
    assert run(trained, "decoder", *extra, f'train.save_dir_root = "{tmp_path}/run"') == metrics
    assert lines(tmp_path / "run" / "metrics.jsonl") == log


def test_sasrec_is_trained_beside_it(trained, tmp_path):
    extra = ("train.iterations = 20", "train.sasrec_baseline = True", f'train.save_dir_root = "{tmp_path}/run"')
    small = (
        "train_sasrec.iterations = 300",
        "train_sasrec.learning_rate = 1e-2",
        "SasRec.dim = 32",
        "SasRec.dropout = 0.0",
    )
    metrics = run(trained, "decoder", *extra, *small, "train_sasrec.batch_size = 16", "train_sasrec.eval_every = 100")
    assert metrics["test/sasrec/all/recall@1"] > 0.8


def test_a_bidirectional_encoder_trains_on_one_target_a_history(trained, tmp_path):
    bidirectional = ("EncoderDecoderRetrievalModel.causal_encoder = False", "train.every_position = False")
    metrics = run(trained, "decoder", *TIGER, *bidirectional, f'train.save_dir_root = "{tmp_path}/run"')
    assert metrics["test/recall@5"] > 0.7
    with pytest.raises(ValueError, match="every_position = False"):
        run(trained, "decoder", bidirectional[0], f'train.save_dir_root = "{tmp_path}/wrong"')


def test_semantic_ids_of_another_corpus_are_refused_before_anything_is_written(trained, tmp_path):
    write_raw(tmp_path, step=11)
    with pytest.raises(ValueError, match=r"made for corpus 'amazon_beauty' \(.*the data is corpus 'amazon_beauty' \("):
        run(tmp_path, "decoder", f'train.pretrained_rqvae_path = "{trained}/out/rqvae"')
    assert not (tmp_path / "out").exists()


def test_a_missing_tokenizer_is_named(tmp_path):
    write_raw(tmp_path)
    with pytest.raises(FileNotFoundError, match="No semantic IDs at .*out/rqvae.*train_rqvae.py"):
        run(tmp_path, "decoder")


def test_a_missing_tokenizer_of_the_default_is_not_asked_of_the_hub(tmp_path, monkeypatch, hub):
    write_raw(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="No semantic IDs at './out/rqvae_amazon_beauty'.*train_rqvae.py"):
        train_decoder.train(RecDataset.AMAZON, ".", "beauty")
    assert hub.asked == []


def test_the_pipeline_is_uploaded_with_a_card_whose_lines_run(trained, tmp_path, hub, capsys):
    short = ("train.iterations = 2", "train.full_eval_every = 2", f'train.save_dir_root = "{tmp_path}/run"')
    with pytest.raises(ValueError, match="train.push_to_hf needs train.hf_model_name"):
        run(trained, "decoder", *short, "train.push_to_hf = True", 'train.hf_model_name = "shop"')
    metrics = run(trained, "decoder", *short, "train.push_to_hf = True", 'train.hf_model_name = "owner/shop"')
    assert capsys.readouterr().out.endswith(f"Uploaded to {hub.endpoint}/owner/shop\n")
    files, folder = hub.repositories["owner/shop"]["main"], tmp_path / "run" / "pipeline"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert set(files) == names >= {"README.md", "config.gin", "tokenizer/sources.json", "pipeline.json"}
    assert all(files[name] == (folder / name).read_bytes() for name in names - {"README.md"})
    card = ModelCard(files["README.md"].decode())
    assert card.data.model_name == "owner/shop" and card.data.library_name and card.data.license == "unknown"
    shown = {result.metric_type: result.metric_value for result in card.data.eval_results}
    expected = {name: metrics[f"test/{name}"] for name in ("recall@5", "ndcg@5", "recall@10", "ndcg@10")}
    assert shown == pytest.approx(expected, abs=5e-5)
    assert {result.dataset_name for result in card.data.eval_results} == {"amazon_beauty"}
    exec(re.search(r"```python\n(.*?)```", card.text, re.DOTALL)[1], {})
    history = json.loads(re.search(r"recommend\(\[(.*?)\], k=5", card.text)[1])
    [found] = Recommender.from_pretrained(folder).recommend([history], k=5)
    assert len(found.items) == 5 and len(history) == 2
    assert capsys.readouterr().out == "".join(f"{item.key} {item.title} {item.score}\n" for item in found.items)


def test_too_few_beams_are_refused(trained):
    with pytest.raises(ValueError, match=r"train.beams = 5 cannot rank the first 10"):
        run(trained, "decoder", *TIGER, "train.beams = 5")
    with pytest.raises(ValueError, match=r"train.top_k = \(1, 5\) lacks 10"):
        run(trained, "decoder", "train.top_k = (1, 5)")


def test_another_config_does_not_overwrite_a_run(trained):
    root = trained / "out" / "decoder"
    before = {path: path.stat().st_mtime_ns for path in root.rglob("[!.]*")}
    with pytest.raises(ValueError, match=r"(?s)another config.*train.learning_rate: 0.01 -> 0.5.*save_dir_root"):
        run(trained, "decoder", "train.learning_rate = 0.5")
    with pytest.raises(ValueError, match="already holds a run"):
        run(trained, "decoder", "train.resume = False")
    assert {path: path.stat().st_mtime_ns for path in root.rglob("[!.]*")} == before


def test_as_many_beams_as_items_rank_the_whole_catalogue(trained, tmp_path):
    extra = ("train.iterations = 10", f"train.beams = {N_ITEMS}", f"train.top_k = (10, {N_ITEMS})")
    metrics = run(trained, "decoder", *extra, f'train.save_dir_root = "{tmp_path}"')
    ranks = load_file(tmp_path / "ranks.safetensors")
    assert metrics[f"test/recall@{N_ITEMS}"] == 1.0
    assert all(torch.equal(ranks[f"beams/{protocol}"], ranks[f"fused/{protocol}"]) for protocol in ("all", "new"))


def test_a_run_is_not_continued_with_other_semantic_ids(trained, tmp_path):
    write_raw(tmp_path)
    run(tmp_path, "rqvae")
    run(tmp_path, "decoder", "train.iterations = 5")
    shutil.rmtree(tmp_path / "out" / "rqvae")
    run(tmp_path, "rqvae", "train.seed = 1")
    with pytest.raises(ValueError, match="(?s)another config.*semantic_ids: "):
        run(tmp_path, "decoder", "train.iterations = 5")


def test_both_protocols_are_reported_whichever_chooses(trained, tmp_path):
    common = ("train.iterations = 20", "train.full_eval_every = 20")
    new = run(trained, "decoder", *common, "train.exclude_history = True", f'train.save_dir_root = "{tmp_path}/new"')
    every = run(trained, "decoder", *common, f'train.save_dir_root = "{tmp_path}/all"')
    for name in ("tree/new/recall@10", "items/all/ndcg@5", "most_popular/new/recall@10", "transition/all/mrr"):
        assert new[f"test/{name}"] == every[f"test/{name}"]
    assert new["test/recall@10"] == new["test/fused/new/recall@10"]
    assert new["test/most_popular/new/recall@10"] > new["test/most_popular/all/recall@10"]
    assert 0 < new["test/distinct_share"] <= 1


def test_half_precision_trains(trained, tmp_path):
    amp = ("train.amp = True", 'train.mixed_precision_type = "bf16"', "train.iterations = 100")
    losses = []
    for name, extra in (("half", amp), ("full", amp[2:])):
        launch(trained, "decoder", *extra, f'train.save_dir_root = "{tmp_path}/{name}"', processes=1)
        rows = [row for row in lines(tmp_path / name / "metrics.jsonl") if row["split"] == "valid" and "loss" in row]
        losses.append(rows[-1]["loss"])
    assert losses[0] == pytest.approx(losses[1], abs=0.1)


def test_your_own_tables_train_both_stages_on_a_temporal_split(tmp_path, capsys):
    """Stage 2 names the corpus only; a tokenizer of another split is refused."""
    write_raw(tmp_path)
    raw = tmp_path / "raw" / "beauty"
    rows = [line.split() for line in (raw / "sequential_data.txt").read_text().splitlines()]
    events = [f"{user},{item},{time + int(user)}" for user, *items in rows for time, item in enumerate(items)]
    (tmp_path / "events.csv").write_text("user,item,timestamp\n" + "\n".join(events))
    titles = [f"{n + 1},thing{n % 5} of kind{n // 5}" for n in range(N_ITEMS)]
    (tmp_path / "items.csv").write_text("item,title\n" + "\n".join(titles))
    name = ("train.dataset = %data.processed.RecDataset.CUSTOM", 'train.dataset_split = ""', 'CustomData.name = "mine"')
    files = (f'CustomData.interactions = "{tmp_path}/events.csv"', f'CustomData.items = "{tmp_path}/items.csv"')
    split = ("train.split = 'temporal'", "temporal.test_share = 0.3")
    features = ("TfidfSvd.min_df = 1", 'CustomData.text_columns = ("title",)')
    run(tmp_path, "rqvae", *name, *files, *split, *features)
    metrics = run(tmp_path, "decoder", *name, *split, "train.iterations = 100")
    assert metrics["test/recall@1"] > 0.5 and metrics["test/transition/all/recall@1"] > 0.5
    output = capsys.readouterr().out
    assert output.count("temporal 60/10/30 % split") == 3, "in both headings and over the figures"
    config = (tmp_path / "out" / "decoder" / "config.gin").read_text()
    assert "split = 'temporal'" in config and "temporal.test_share = 0.3" in config
    for other in ((), (split[0],)):
        with pytest.raises(ValueError, match="temporal 60/10/30 % split and may know"):
            run(tmp_path, "decoder", *name, *other)
