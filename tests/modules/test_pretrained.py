"""Models from and to a Hub: a server on this machine that speaks the client's protocol."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modules.pretrained import push_folder, resolve
from modules.rqvae import RqVae
from tests.hub import commit_of

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def model():
    return RqVae(6, embed_dim=3, hidden_dims=(5,), codebook_size=4)


def same(one: RqVae, other: RqVae) -> bool:
    weights = other.state_dict()
    return one.config == other.config and all(
        torch.equal(weights[name], part) for name, part in one.state_dict().items()
    )


def test_what_is_pushed_is_pulled(hub, model):
    assert model.push_to_hub("owner/tokenizer") == f"{hub.endpoint}/owner/tokenizer"
    assert set(hub.repositories["owner/tokenizer"]["main"]) == {"config.json", "model.safetensors", "README.md"}
    assert same(RqVae.from_pretrained("owner/tokenizer"), model)


def test_a_saved_model_may_be_read_by_whoever_may_read_any_new_file(model, tmp_path):
    model.save_pretrained(tmp_path / "folder")
    (tmp_path / "new").touch()
    modes = {path.stat().st_mode for path in (tmp_path / "folder").iterdir()}
    assert modes == {(tmp_path / "new").stat().st_mode}


def test_a_folder_is_pushed_again_over_the_old_one(hub, model, tmp_path):
    model.push_to_hub("owner/tokenizer")
    other = RqVae(6, embed_dim=3, hidden_dims=(5,), codebook_size=4)
    other.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "notes.log").write_text("stays here")
    (tmp_path / "folder" / "GROUPLENS.txt").write_text("terms")
    push_folder(tmp_path / "folder", "owner/tokenizer")
    pushed = hub.repositories["owner/tokenizer"]["main"]
    assert "notes.log" not in pushed and pushed["GROUPLENS.txt"] == b"terms"
    assert same(RqVae.from_pretrained("owner/tokenizer"), other)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, model):
    model.push_to_hub("owner/tokenizer")
    old = dict(hub.repositories["owner/tokenizer"]["main"])
    hub.repositories["owner/tokenizer"]["v1"] = old
    other = RqVae(6, embed_dim=2, hidden_dims=(5,), codebook_size=4)
    other.push_to_hub("owner/tokenizer")
    for revision in ("v1", commit_of("v1", old)):
        assert same(RqVae.from_pretrained("owner/tokenizer", revision=revision), model)
    assert same(RqVae.from_pretrained("owner/tokenizer"), other)
    with pytest.raises(FileNotFoundError, match="no revision 'v2' of the Hub repository 'owner/tokenizer'"):
        RqVae.from_pretrained("owner/tokenizer", revision="v2")


def test_a_repository_that_is_not_there_is_named(hub):
    with pytest.raises(FileNotFoundError, match="nor the Hub repository 'owner/nothing'"):
        RqVae.from_pretrained("owner/nothing")


def test_a_private_repository_needs_a_token(hub, model, monkeypatch):
    model.push_to_hub("owner/tokenizer")
    hub.private.add("owner/tokenizer")
    with pytest.raises(FileNotFoundError, match="'owner/tokenizer', or it is private: log in with `hf auth login`"):
        RqVae.from_pretrained("owner/tokenizer")
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    assert same(RqVae.from_pretrained("owner/tokenizer"), model)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_not_there_is_named(hub, model, name):
    model.push_to_hub("owner/tokenizer")
    del hub.repositories["owner/tokenizer"]["main"][name]
    with pytest.raises(FileNotFoundError, match=f"no {name} in the Hub repository 'owner/tokenizer'"):
        RqVae.from_pretrained("owner/tokenizer")


@pytest.mark.parametrize("content", [b"", b"no safetensors file, but longer than a header's eight bytes"])
def test_a_damaged_file_is_named(hub, model, content):
    model.push_to_hub("owner/tokenizer")
    hub.repositories["owner/tokenizer"]["main"]["model.safetensors"] = content
    with pytest.raises(ValueError, match="is damaged .*: delete .*models--owner--tokenizer to fetch it again"):
        RqVae.from_pretrained("owner/tokenizer")


def test_without_a_network_a_cached_copy_serves(hub, model, monkeypatch):
    """And nothing is tried again and again."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("the client waits"))
    model.push_to_hub("owner/tokenizer")
    RqVae.from_pretrained("owner/tokenizer")
    hub.close()
    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert same(RqVae.from_pretrained("owner/tokenizer"), model)
        with pytest.raises(FileNotFoundError, match="no sources.json in the Hub repository 'owner/tokenizer'"):
            resolve("owner/tokenizer", files=("sources.json",))
        for absent in (lambda: resolve("owner/other"), lambda: resolve("owner/tokenizer", files=("README.md",))):
            with pytest.raises(ConnectionError, match=r"^There is no .* whole in the local cache.*fetched: [^\n]*$"):
                absent()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match="'owner/tokenizer' took no upload"):
        model.push_to_hub("owner/tokenizer")


def test_an_upload_that_is_refused_is_told(hub, model):
    hub.read_only = True
    with pytest.raises(PermissionError, match="'owner/tokenizer' took no upload.*hf auth login"):
        model.push_to_hub("owner/tokenizer")


def test_what_is_meant_to_be_on_this_machine_is_never_looked_for_elsewhere(tmp_path, monkeypatch, hub):
    monkeypatch.chdir(tmp_path)
    hub.repositories["out/run"] = {"main": {}}
    for path in (Path("out/run"), "./out/run", "../out/run", "~/run", "out/run/deeper", "out/a--b", "run"):
        with pytest.raises(FileNotFoundError, match=f"no file or folder '{path}', and it is no Hub id"):
            resolve(path)
    (tmp_path / "out" / "run").mkdir(parents=True)
    assert resolve("out/run") == Path("out/run")
    with pytest.raises(ValueError, match="revision = 'v1'"):
        resolve("out/run", "v1")
    with pytest.raises(FileNotFoundError, match="no Hub id"):
        resolve("out/other")
    assert hub.asked == []


def test_the_clients_own_setting_of_the_endpoint_holds(hub, model, tmp_path):
    model.push_to_hub("owner/tokenizer")
    load = "RqVae.from_pretrained('owner/tokenizer').config"
    program = f"import json; from modules.rqvae import RqVae; print(json.dumps({load}))"
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == model.config
