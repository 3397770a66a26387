"""Tokenizers that the original RQ-VAE-Recommender published: Hub folders and `.pt` checkpoints."""

import logging
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from modules.quantize import QuantizeForwardMode, QuantizeMode

logger = logging.getLogger(__name__)


def legacy_arguments(config: dict, activation: str | None) -> dict:
    """Arguments of `RqVae` for the original's model_config. The activation changed from SiLU to ReLU together with the
    decoder, whose output had length 1 until then."""
    if activation is None:
        logger.warning(
            "The tokenizer's config does not say which activation it was trained with; taking 'silu'. "
            'If it dates from March 2026 or later, load it with activation="relu".'
        )
        activation = "silu"
    mode = config.get("codebook_mode", QuantizeForwardMode.ROTATION_TRICK)
    return {
        **config,
        "codebook_mode": QuantizeMode[QuantizeForwardMode(mode).name].value,
        "activation": activation,
        "normalize_output": activation == "silu",
        "standardize": "none",
        "separate_collisions": False,
    }


def read_checkpoint(path: Path, allow_pickle: bool) -> tuple[dict, dict[str, Tensor]]:
    """Config and weights of a `.pt` checkpoint: {iter, model, model_config, optimizer}. Only tensors, plain containers
    and `QuantizeForwardMode` are read; whatever else a pickle could call is refused, unless allow_pickle. Raises
    ValueError that names the file."""
    if not zipfile.is_zipfile(path):  # torch's older formats are pickles as a whole
        raise ValueError(f"{path} is no checkpoint in torch's zip format, or it is damaged.")
    try:
        with torch.serialization.safe_globals([QuantizeForwardMode]):
            state = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
        return dict(state["model_config"]), dict(state["model"])
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds pickled objects other than tensors, which would run code when loaded. If you trust whoever "
            "made it, load it with RqVae.from_pretrained(path, allow_pickle=True)."
        ) from error
    except (KeyError, TypeError, RuntimeError, EOFError, AttributeError) as error:
        raise ValueError(f"{path} is not a tokenizer checkpoint, or it is damaged ({error!r}).") from error
