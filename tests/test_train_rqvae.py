import json
import shutil

import numpy as np
import pytest
import torch
from accelerate.utils import set_seed
from safetensors.torch import load_file

from data.processed import RecDataset, load_corpus
from data.shuffle import Shuffler, derive_seed
from modules.quantize import QuantizeMode
from modules.rqvae import RqVae
from modules.tokenizer.catalogue import catalogue_codes
from modules.tokenizer.semids import SemanticIds, load_item_features
from tests.pipeline import THINGS, launch, lines, run, write_raw
from training.schedule import warmup_cosine


def test_the_run_folder_keeps_the_contract(trained):
    root = trained / "out" / "rqvae"
    assert {path.name for path in root.iterdir()} == {
        ".lock",
        "config.gin",
        "metrics.jsonl",
        "metrics.json",
        "checkpoints",
        "plots",
        "tokenizer",
    }
    files = {path.name for path in (root / "tokenizer").iterdir()}
    assert files == {"config.json", "model.safetensors", "semantic_ids.safetensors", "features.npy", "README.md"} | {
        "sources.json",
        "sources.safetensors",
    }
    plots = {"losses.png", "usage.png", "code_frequency.png", "categories.png"}
    assert {path.name for path in (root / "plots").iterdir()} == plots
    assert (root / "checkpoints" / "LAST").read_text().strip() == "step_00000060"
    assert "RqVae.codebook_size = 6" in (root / "config.gin").read_text()
    metrics = json.loads((root / "metrics.json").read_text())
    assert metrics["usage_1"] == metrics["usage_2"] == 1.0
    assert metrics["loss"] == pytest.approx(metrics["reconstruction_loss"] + metrics["quantize_loss"])
    losses = [row["loss"] for row in lines(root / "metrics.jsonl") if row["split"] == "train"]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_semantic_ids_are_the_models_codes_and_unique(trained):
    semantic_ids = SemanticIds.load(trained / "out" / "rqvae")
    model = RqVae.from_pretrained(trained / "out" / "rqvae" / "tokenizer")
    features = [path for path in (trained / "features" / "amazon_beauty").iterdir() if path.suffix == ".npy"]
    assert len(features) == 1
    x = torch.from_numpy(np.load(features[0]))
    assert torch.equal(catalogue_codes(model, x), semantic_ids.codes[:, :2])
    seen = load_item_features(trained / "out" / "rqvae", None, semantic_ids)
    np.testing.assert_allclose(seen, model.normalized(x), rtol=2**-10, atol=1e-5)
    assert len(set(map(tuple, semantic_ids.codes.tolist()))) == semantic_ids.n_items == 30
    corpus = load_corpus(RecDataset.AMAZON, str(trained), "beauty")
    assert semantic_ids.item_keys == corpus.item_keys
    semantic_ids.check_corpus(corpus.name, corpus.hash)


@pytest.mark.parametrize(
    ("micro_steps", "options"),
    [(1, []), (3, []), (1, ['RqVae.codebook_mode = "ste"', 'RqVae.codebook_update = "ema"'])],
)
def test_the_weights_are_those_of_a_loop_written_out(trained, tmp_path, micro_steps, options):
    gpu = torch.cuda.is_available()
    device, tolerance = ("cuda", 1e-2) if gpu else ("cpu", 1e-4)  # there matrix products are in TF32
    options = [*options, f"train.gradient_accumulate_every = {micro_steps}", f"train.batch_size = {15 // micro_steps}"]
    options += ["train.iterations = 12", "train.refit_every = 5", "train.max_gradient_norm = 0.5"]
    run(trained, "rqvae", *options, "train.warmup_steps = 4", f'train.save_dir_root = "{tmp_path}"')
    (path,) = (trained / "features" / "amazon_beauty").glob("tfidf-svd-dim-8-*.npy")
    x = torch.from_numpy(np.load(path)).to(device)
    config = json.loads((tmp_path / "tokenizer" / "config.json").read_text())
    set_seed(0)
    model = RqVae(**config).to(device)
    generator = torch.Generator(device).manual_seed(0)
    rows = torch.randperm(len(x), generator=generator, device=device)
    model.initialize(x[rows], generator)
    optimizer, shuffler, clipped = torch.optim.AdamW(model.parameters(), weight_decay=0.01), Shuffler(30, 15, 0), []
    for step in range(12):
        optimizer.param_groups[0]["lr"] = 1e-3 * warmup_cosine(step, 4, 12)
        model(x[shuffler.draw(step)[0].to(device)]).loss.backward()
        clipped.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)) > 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in (5, 10, 12):
            model.fit_codebooks(x[rows], torch.Generator(device).manual_seed(derive_seed(0, "refit", step)))
            for parameter in model.layers.parameters():
                for moment in optimizer.state.get(parameter, {}).values():
                    moment.zero_()
    assert any(clipped)
    weights = load_file(tmp_path / "checkpoints" / "step_00000012" / "model.safetensors")
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=tolerance, atol=tolerance, check_device=False)


@pytest.mark.parametrize(
    "binding",
    [f"codebook_mode = %modules.quantize.QuantizeMode.{mode.name}" for mode in QuantizeMode]
    + ["codebook_sim_vq = True", 'codebook_update = "ema"'],
)
def test_every_mode_trains_and_leaves_no_code_unused(trained, tmp_path, binding):
    extra = ["RqVae.codebook_mode = %modules.quantize.QuantizeMode.STE"] if "ema" in binding else []
    extra += ["train.warmup_steps = 5", "train.learning_rate = 3e-3"]  # so that 60 steps train it
    metrics = run(trained, "rqvae", *extra, f"RqVae.{binding}", f'train.save_dir_root = "{tmp_path}"')
    losses = [row["loss"] for row in lines(tmp_path / "metrics.jsonl") if row["split"] == "catalogue"]
    assert losses[-1] < 0.8 * losses[0]
    assert metrics["usage_1"] == 1.0


def test_residual_kmeans_needs_no_training(trained, tmp_path):
    metrics = run(
        trained, "rqvae", "RqVae.hidden_dims = None", "train.iterations = 0", f'train.save_dir_root = "{tmp_path}"'
    )
    assert metrics["usage_1"] == metrics["usage_2"] == 1.0
    assert SemanticIds.load(tmp_path).n_items == 30


def test_a_collapsed_tokenizer_is_an_error_or_by_config_a_warning(trained, tmp_path, capsys):
    root = f'train.save_dir_root = "{tmp_path}"'
    collapsed = ["train.refit_every = 0", "RqVae.codebook_kmeans_init = False", "train.iterations = 3", root]
    with pytest.raises(ValueError, match=r"Codebook collapse: level . uses .*% of its codes.*train.min_usage = 95%"):
        run(trained, "rqvae", *collapsed, "train.min_usage = 0.95")
    shutil.rmtree(tmp_path)
    run(trained, "rqvae", *collapsed, "train.min_usage = 0.95", "train.collapse_is_error = False")
    assert "Warning: Codebook collapse" in capsys.readouterr().out
    shutil.rmtree(tmp_path)
    run(trained, "rqvae", *collapsed, "train.min_usage = 0.0")
    assert "Verdict: most items share their codes with another: raise RqVae.n_layers" in capsys.readouterr().out


def test_the_tokenizer_is_uploaded_and_the_decoder_takes_its_hub_id(trained, tmp_path, hub):
    root = f'train.save_dir_root = "{tmp_path}/run"'
    run(trained, "rqvae", "train.push_vae_to_hf = True", 'train.vae_hf_model_name = "owner/beauty"', root)
    assert "amazon_beauty (30 items)" in hub.repositories["owner/beauty"]["main"]["README.md"].decode()
    ids = SemanticIds.load("owner/beauty")
    assert torch.equal(ids.codes, SemanticIds.load(tmp_path / "run").codes)
    seen = load_item_features("owner/beauty", None, ids)
    assert np.array_equal(seen, load_item_features(tmp_path / "run", None, ids)) and len(seen) == 30
    stage_2 = ["train.iterations = 2", "train.full_eval_every = 2", 'train.pretrained_rqvae_path = "owner/beauty"']
    run(trained, "decoder", *stage_2, f'train.save_dir_root = "{tmp_path}/decoder"')
    again = [*stage_2, "train.features = [@TfidfSvd()]", "TfidfSvd.dim = 8"]
    run(trained, "decoder", *again, f'train.save_dir_root = "{tmp_path}/computed"')
    states = [tmp_path / name / "checkpoints" / "step_00000002" / "state.json" for name in ("decoder", "computed")]
    assert len({json.loads(state.read_text())["config"]["semantic_ids"] for state in states}) == 1
    with pytest.raises(ValueError, match=r"trained with tfidf-svd\(dim=8.*train.features is tfidf-svd\(dim=5"):
        run(trained, "decoder", *again, "TfidfSvd.dim = 5", f'train.save_dir_root = "{tmp_path}/other"')
    del hub.repositories["owner/beauty"]["main"]["features.npy"]
    with pytest.raises(FileNotFoundError, match="no features.npy in the Hub repository 'owner/beauty'"):
        load_item_features("owner/beauty", None, ids)
    assert torch.equal(SemanticIds.load("owner/beauty").codes, ids.codes), "and all else is there"


def test_ties_are_shuffled_for_the_features_too(tmp_path):
    rows = [f"u{user},i{(user * 7 + n * n) % 12},{n // 4}" for user in range(40) for n in range(8)]
    (tmp_path / "events.csv").write_text("\n".join(["user,item,timestamp", *rows]))
    custom = ["train.dataset = %data.processed.RecDataset.CUSTOM", 'train.dataset_split = ""', "train.iterations = 0"]
    custom += [f'CustomData.interactions = "{tmp_path}/events.csv"', "train.features = [@CoOccurrenceSvd()]"]
    custom += ["CoOccurrenceSvd.dim = 8", "CoOccurrenceSvd.window = 1", "train.collapse_is_error = False"]
    made = []
    for name, ties in {"source": [], "first": ["split.tie_seed = 1"], "second": ["split.tie_seed = 2"]}.items():
        run(tmp_path, "rqvae", *custom, *ties, f'train.save_dir_root = "{tmp_path}/{name}"')
        made.append(SemanticIds.load(tmp_path / name).tokenizer)
        assert not (tmp_path / name / "tokenizer" / "features.npy").exists(), "nothing describes the items"
    names = ["leave-one-out", "leave-one-out (tie seed 1)", "leave-one-out (tie seed 2)"]
    assert [tokenizer["split"] for tokenizer in made] == names
    assert len({tokenizer["weights"] for tokenizer in made}) == 3 and "item_features" not in made[0]


def test_without_times_there_are_no_ties(trained):
    with pytest.raises(ValueError, match="split.tie_seed = 1 needs timestamps"):
        run(trained, "rqvae", "split.tie_seed = 1")


def test_an_upload_needs_a_name(trained):
    with pytest.raises(ValueError, match="needs train.vae_hf_model_name"):
        run(trained, "rqvae", "train.push_vae_to_hf = True")


def test_categories_become_trailing_features_and_stage_2_gets_what_describes_the_items(trained, tmp_path):
    sources = ["train.features = [@CoOccurrenceSvd(), @TfidfSvd()]", "CoOccurrenceSvd.dim = 6"]
    run(trained, "rqvae", *sources, "train.categories = True", f'train.save_dir_root = "{tmp_path}"')
    config = RqVae.from_pretrained(tmp_path / "tokenizer").config
    assert (config["input_dim"], config["n_cat_features"]) == (6 + 8 + 5, 5)
    values = load_item_features(tmp_path, None, SemanticIds.load(tmp_path)).astype(np.float64)
    (path,) = (trained / "features" / "amazon_beauty").glob("tfidf-svd-dim-8-*.npy")
    texts = np.load(path) - np.load(path).mean(0)
    np.testing.assert_allclose(values[:, :8], texts * values[0, 0] / texts[0, 0], rtol=0.01, atol=2e-3)
    things = [sorted(THINGS).index(THINGS[n // 6]) for n in range(30)]
    np.testing.assert_array_equal(values[:, 8:], np.eye(5)[things])


def test_two_processes_give_the_codes_of_one(trained, tmp_path):
    one = run(trained, "rqvae", f'train.save_dir_root = "{tmp_path}/one"')
    two = launch(trained, "rqvae", f'train.save_dir_root = "{tmp_path}/two"')
    assert two == pytest.approx(one, abs=1e-5)
    ids = [SemanticIds.load(tmp_path / name).codes for name in ("one", "two")]
    assert torch.equal(*ids)


def test_two_processes_may_rebuild_the_caches(tmp_path):
    write_raw(tmp_path)
    metrics = launch(tmp_path, "rqvae", "train.force_dataset_process = True", "train.iterations = 5")
    assert metrics["usage_1"] == 1.0
