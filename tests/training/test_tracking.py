import json
import socket
import struct

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from tests.pipeline import lines, run
from training import tracking
from training.tracking import Wandb


def records(path):
    """The records of a .wandb file: a log of LevelDB's format (blocks of 32 KiB) after a header of 7 bytes."""
    content, place, parts = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if 2**15 - place % 2**15 < 7:  # no record begins in the last 6 bytes of a block
            place += 2**15 - place % 2**15
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read(root):
    """Curves as {(name, step): value}, config and summary of the offline runs in a run folder."""
    wandb.teardown()  # its service has then written all
    curves, config, summary = {}, {}, {}
    for path in sorted(root.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
            curves |= {(name, items["_step"]): value for name, value in items.items() if not name.startswith("_")}
            for update in [*record.config.update, *record.run.config.update]:
                config[update.key or "/".join(update.nested_key)] = json.loads(update.value_json)
            summary |= {item.key: json.loads(item.value_json) for item in record.summary.update}
    return curves, config, summary


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    wandb.teardown()  # it reads the environment once
    yield
    wandb.teardown()


def test_an_offline_run_holds_the_curves_the_config_and_the_final_table(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    extra = ("train.iterations = 20", "train.full_eval_every = 10", "train.wandb_logging = True")
    metrics = run(trained, "decoder", *extra, f'train.save_dir_root = "{tmp_path}"')
    curves, config, summary = read(tmp_path)
    for row in lines(tmp_path / "metrics.jsonl"):
        step, split = row.pop("step"), row.pop("split")
        for name, value in row.items():
            assert curves[f"{split}/{name}", step] == value
    assert {name for name, _ in curves} >= {"train/loss", "train/gradient_norm", "train/learning_rate", "valid/ndcg@10"}
    config = {name.removeprefix("train_decoder."): value for name, value in config.items()}
    assert config["train.batch_size"] == 16 and config["EncoderDecoderRetrievalModel.causal_encoder"] is True
    assert "train.warmup_steps = 10" in config["gin"]
    assert {name: summary[name] for name in metrics} == metrics
    assert len(metrics) > 10


@pytest.mark.parametrize("answers", [False, True], ids=["refused", "hangs"])
def test_a_server_that_does_not_answer_turns_the_run_offline(tmp_path, monkeypatch, capsys, answers):
    monkeypatch.setattr(tracking, "INIT_TIMEOUT", 1.0)
    monkeypatch.setattr(tracking, "FINISH_TIMEOUT", 1.0)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if answers:
            server.listen()  # connections are made, and nothing is ever said
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        tracker = Wandb("test", tmp_path)
        tracker.log(1, {"train/loss": 2.5})
        tracker.finish({"test/recall@10": 0.5})
    curves, _, summary = read(tmp_path)
    assert curves["train/loss", 1] == 2.5 and summary["test/recall@10"] == 0.5
    assert capsys.readouterr().err.count("warning: wandb can't start") == 1


@pytest.mark.parametrize("name", ["config", "log", "summary", "finish"])
def test_a_call_that_fails_is_warned_of_once(tmp_path, monkeypatch, capsys, name):
    class Failing:
        def __getattr__(self, called):
            if called == name:
                raise ConnectionError("no route to host")
            return self if called in ("config", "summary") else lambda *args, **kwargs: None

    monkeypatch.setattr(wandb, "init", lambda **kwargs: Failing())
    tracker = Wandb("test", tmp_path)
    tracker.config({"train.seed": 0})
    tracker.log(1, {"train/loss": 2.5})
    tracker.log(2, {"train/loss": 2.4})
    tracker.finish({})
    assert capsys.readouterr().err.count("warning: wandb failed") == 1


def test_wandb_that_cannot_start_at_all_is_left_out(tmp_path, monkeypatch, capsys):
    def init(**kwargs):
        raise OSError("no such executable")

    monkeypatch.setattr(wandb, "init", init)
    tracker = Wandb("test", tmp_path)
    tracker.log(1, {"train/loss": 2.5})
    tracker.finish({})
    assert capsys.readouterr().err.count("can't start") == 2


def test_a_resumed_run_is_the_same_run(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(wandb, "init", lambda **kwargs: seen.append(kwargs))
    Wandb("test", tmp_path)
    Wandb("test", tmp_path)
    assert seen[0]["id"] == seen[1]["id"] and seen[0]["resume"] == "allow"
