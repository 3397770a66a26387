"""Models as folders: config.json and model.safetensors, the layout of the Hugging Face Hub; from and to the Hub."""

import json
import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from common.files import write_file, write_tensors

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
PLACE = "<this repository or folder>"  # in a card; an upload puts the repository's id there
UPLOADED = {".json", ".safetensors", ".npy", ".gin", ".md", ".txt"}
HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]*/\w([\w.-]*\w)?")


def save_pretrained(model: nn.Module, config: dict, folder: str | Path) -> None:
    """Writes what rebuilds the model: config, the arguments of its class, and its weights."""
    folder = Path(folder)
    write_tensors(folder / WEIGHTS, model.state_dict())
    write_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_pretrained(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Config and weights that `save_pretrained` wrote. Raises FileNotFoundError that names a missing file, ValueError
    that names a damaged one."""
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: it is not a saved model.")
    try:
        return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"The model in {folder} is damaged ({error}): {anew(folder)}.") from error


def anew(folder: Path) -> str:
    """How to replace a damaged copy."""
    if folder.parent.name == "snapshots":  # of the Hub's cache
        return f"delete {folder.parents[1]} to fetch it again"
    return "copy the whole folder again"


def resolve(path: str | Path, revision: str | None = None, files: tuple[str, ...] = (CONFIG, WEIGHTS)) -> Path:
    """A local file or folder as it is; otherwise the Hub repository `owner/name` as a folder in the Hub's cache.

    A Hub id is a text; a `Path`, what begins with ./ or has a folder of the owner's name beside it is never asked for.
    revision: branch, tag or commit of the repository. files: what to fetch, all of one commit. Without a network a
    cached copy serves. Raises FileNotFoundError where neither exists or a file is missing, ConnectionError where the
    Hub is out of reach and nothing cached.
    """
    local = Path(path).expanduser()
    if local.exists():
        if revision is not None:
            raise ValueError(f"revision = {revision!r} is of a Hub repository, and '{path}' exists on this machine.")
        return local
    if isinstance(path, Path) or not HUB_ID.fullmatch(path) or local.parent.is_dir():
        raise FileNotFoundError(f"There is no file or folder '{path}', and it is no Hub id (owner/name) either.")
    from huggingface_hub import errors, snapshot_download

    repo = f"the Hub repository '{path}'"
    try:
        folder = Path(snapshot_download(path, revision=revision, allow_patterns=list(files)))
    except errors.RevisionNotFoundError as error:
        raise FileNotFoundError(f"There is no revision {revision!r} of {repo}.") from error
    except errors.RepositoryNotFoundError as error:
        raise FileNotFoundError(
            f"There is no file or folder '{path}', nor {repo}, or it is private: log in with `hf auth login`."
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HTTPError) as error:
        raise ConnectionError(
            f"There is no file or folder '{path}', and {repo} is neither whole in the local cache nor can it be "
            f"fetched: {_first_line(error)}"
        ) from error
    for name in files:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"There is no {name} in {repo}: it is not a saved model.")
    return folder


def push_folder(folder: str | Path, repo_id: str, private: bool = False) -> str:
    """Uploads a tokenizer or pipeline folder to the Hub repository `owner/name`, made if need be, in one commit.

    The card there names the repository. Returns the address.

    Raises PermissionError or ConnectionError that names the repository; the folder stays as it is.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, errors

    folder = Path(folder)
    found = [path for path in (*folder.glob("[!.]*"), *folder.glob("tokenizer/[!.]*")) if path.suffix in UPLOADED]
    try:
        api = HfApi()
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        files = []
        for path in found:
            filled = path.name == CARD and path.read_text(encoding="utf-8").replace(PLACE, address.repo_id).encode()
            files.append(CommitOperationAdd(path.relative_to(folder).as_posix(), filled or path))
        api.create_commit(address.repo_id, files, commit_message=f"Upload {folder.name}")
        return str(address)
    except errors.HFValidationError:  # a name that the Hub does not allow
        raise
    except Exception as error:  # the client's transport raises its own types
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = " Log in with `hf auth login`, with a token that may write." if status in (401, 403) else ""
        kind = PermissionError if hint else ConnectionError
        raise kind(f"The Hub repository '{repo_id}' took no upload: {_first_line(error)}.{hint}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0].rstrip(".")
