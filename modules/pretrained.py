"""Models as folders: config.json and model.safetensors, the layout of the Hugging Face Hub."""

import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from data.files import write_file

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def save_pretrained(model: nn.Module, config: dict, folder: str | Path) -> None:
    """Writes what rebuilds the model: config, the arguments of its class, and its weights."""
    folder = Path(folder)
    write_file(folder / WEIGHTS, save(to_cpu(model.state_dict())))
    write_file(folder / CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def to_cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, contiguous, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def load_pretrained(folder: str | Path) -> tuple[dict, dict[str, Tensor]]:
    """Config and weights that `save_pretrained` wrote.

    Raises FileNotFoundError that names a missing file, ValueError that names a damaged one.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} holds no {name}: it is not a saved model.")
    try:
        return json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"The model in {folder} is damaged ({error}).") from error
