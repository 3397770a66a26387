"""RQ-VAE: an autoencoder whose latent vector is a sum of one code per level (Lee et al. 2022; Rajput et al. 2023)."""

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import InstanceOf
from torch import Tensor, nn

from common.files import write_file
from common.module_list import ModuleList
from common.parameters import NonNegativeInt, PositiveInt, Rate, ShareBelowOne, configurable
from common.prefetch import stream
from modules.card import tokenizer_card
from modules.encoder import MLP
from modules.legacy import legacy_arguments, read_checkpoint
from modules.loss import reconstruction_loss
from modules.normalize import Standardize
from modules.pretrained import CARD, load_pretrained, push_folder, resolve, save_pretrained
from modules.quantize import Quantize, QuantizeMode
from ops.dispatch import has_kernel

NO_SETTINGS = ("self", "from_interactions", "__class__")
CHUNK = 8192  # items coded at a time on a CPU


@dataclass(frozen=True)
class SemanticIdOutput:
    """embeddings, residuals: [B, D, L], the code vectors and what each level had left to explain;
    sem_ids: [B, L] int64; quantize_loss: [B] float32, summed over levels."""

    embeddings: Tensor
    residuals: Tensor
    sem_ids: Tensor
    quantize_loss: Tensor


@dataclass(frozen=True)
class RqVaeLosses:
    """Batch means, float32 scalars."""

    loss: Tensor
    reconstruction_loss: Tensor
    quantize_loss: Tensor


@configurable
class RqVae(nn.Module):
    """Residual-quantized autoencoder.

    input_dim: columns of the features; hidden_dims: of the encoder, mirrored in the decoder; embed_dim: of the
    latent and of every codebook vector; codebook_size: vectors per level; n_layers: levels L.
    n_cat_features: how many trailing columns are multi-hot categories, reconstructed as logits.
    hidden_dims None: no autoencoder; the codes are those of residual k-means of the features.
    codebook_mode, codebook_update, codebook_sim_vq: see `modules.quantize.Quantize`.
    codebook_normalize: latents and first-level codes of length 1.
    standardize: "column" (each column to mean 0 and deviation 1), "global" (each column to mean 0, one
    deviation for all) or "none"; the constants are fitted by `initialize` and stored with the weights.
    normalize_output: the decoder's output has length 1. separate_collisions:
    items of a catalogue that share all codes are told apart by `modules.tokenizer.catalogue.catalogue_codes`.
    drop_interactions: in training, the share of rows whose columns `from_interactions` ([input_dim] bool, not saved)
    the encoder does not see and the decoder restores, so that items without interactions get good codes.
    """

    def __init__(
        self,
        input_dim: PositiveInt,
        embed_dim: PositiveInt = 32,
        hidden_dims: tuple[PositiveInt, ...] | None = (512, 256, 128),
        codebook_size: PositiveInt = 256,
        n_layers: PositiveInt = 3,
        n_cat_features: NonNegativeInt = 0,
        codebook_mode: QuantizeMode = QuantizeMode.ROTATION_TRICK,
        codebook_kmeans_init: bool = True,
        codebook_update: Literal["gradient", "ema"] = "gradient",
        codebook_sim_vq: bool = False,
        codebook_normalize: bool = False,
        commitment_weight: Rate = 0.25,
        standardize: Literal["column", "global", "none"] = "global",
        activation: Literal["relu", "silu"] = "silu",
        normalize_output: bool = False,
        separate_collisions: bool = True,
        drop_interactions: ShareBelowOne = 0.0,
        from_interactions: InstanceOf[np.ndarray] | None = None,
    ) -> None:
        embed_dim = input_dim if hidden_dims is None else embed_dim
        given: dict[str, Any] = {name: value for name, value in locals().items() if name not in NO_SETTINGS}
        super().__init__()
        if n_cat_features >= input_dim:
            raise ValueError(f"RqVae.n_cat_features is {n_cat_features}; the input has {input_dim} columns.")
        if hidden_dims is None and codebook_update == "ema":
            raise ValueError(
                "RqVae.hidden_dims = None with codebook_update = 'ema' leaves nothing to train by gradients: set "
                "codebook_update = 'gradient'."
            )
        sizes = None if hidden_dims is None else list(hidden_dims)
        self.config = given | {"hidden_dims": sizes, "codebook_mode": codebook_mode.value}
        mask = np.zeros(input_dim, dtype=bool) if from_interactions is None else from_interactions
        self.from_interactions = nn.Buffer(torch.from_numpy(mask), persistent=False)
        self.n_cat_features = n_cat_features
        self.standardize = Standardize(input_dim - n_cat_features) if standardize != "none" else None
        dims, plain = [input_dim, *(hidden_dims or ()), embed_dim], hidden_dims is None
        self.encoder = nn.Identity() if plain else MLP(dims, activation, normalize=codebook_normalize)
        self.decoder = nn.Identity() if plain else MLP(dims[::-1], activation, normalize=normalize_output)
        codebook = (codebook_update, codebook_sim_vq)
        usual = codebook_mode is QuantizeMode.ROTATION_TRICK and codebook == ("gradient", False)
        self.plain = usual and not codebook_normalize and embed_dim <= 256  # what the kernel takes
        self.layers: ModuleList[Quantize] = ModuleList(
            Quantize(embed_dim, codebook_size, codebook_mode, commitment_weight, *codebook, normalize)
            for normalize in [codebook_normalize] + [False] * (n_layers - 1)
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
            elif isinstance(module, nn.Embedding):
                nn.init.uniform_(module.weight, -1.0, 1.0)

    @torch.no_grad()
    def initialize(self, x: Tensor, generator: torch.Generator) -> None:
        """Fits what is fitted before training: the standardization, and the codebooks. x: [N, input_dim], a sample of
        the features, at least codebook_size rows. generator: on the device of x."""
        if self.standardize is not None:
            self.standardize.fit(x, self.config["standardize"] == "column")
        if self.config["codebook_kmeans_init"]:
            self.fit_codebooks(x, generator)

    @torch.no_grad()
    def fit_codebooks(self, x: Tensor, generator: torch.Generator) -> None:
        """Replaces each level's codebook by the k-means centroids of its residuals. Arguments as of `initialize`.
        Gradient steps move a code only while it is chosen, so codes die as the encoder moves away from them; k-means
        spreads them over the residuals again, and minimizes the same squared distance."""
        residual = self.encode(x)
        for layer in self.layers:
            layer.fit(residual, generator)
            residual = residual - layer.codebook[layer.nearest(residual)]

    def normalized(self, x: Tensor) -> Tensor:
        """Features as the autoencoder sees them, categories untouched. Shape: [B, input_dim] both."""
        return x if self.standardize is None else self.standardize(x)

    def encode(self, x: Tensor) -> Tensor:
        """[B, input_dim] -> [B, embed_dim]."""
        return self.encoder(self.normalized(x))

    def decode(self, latent: Tensor) -> Tensor:
        """[B, embed_dim] -> [B, input_dim] in the units of the input; categories as logits."""
        decoded = self.decoder(latent)
        return decoded if self.standardize is None else self.standardize.inverse(decoded)

    def quantize(self, latent: Tensor, temperature: float | Tensor = 1.0) -> SemanticIdOutput:
        """latent [B, D]: each level codes what the levels before it left."""
        residual, loss = latent, latent.new_zeros(len(latent), dtype=torch.float32)
        embeddings, residuals, sem_ids = [], [], []
        for layer in self.layers:
            level = layer(residual, temperature)
            residuals.append(residual)
            embeddings.append(level.embeddings)
            sem_ids.append(level.ids)
            residual = residual - level.embeddings
            loss = loss + level.loss
        return SemanticIdOutput(torch.stack(embeddings, -1), torch.stack(residuals, -1), torch.stack(sem_ids, -1), loss)

    def get_semantic_ids(self, x: Tensor, temperature: float = 1.0) -> SemanticIdOutput:
        """x: features [B, input_dim]. In the precision of the weights, under autocast too."""
        with torch.autocast(x.device.type, enabled=False):
            return self.quantize(self.encode(x), temperature)

    def forward(self, x: Tensor, temperature: float = 1.0) -> RqVaeLosses:
        """x: features [B, input_dim]. loss = reconstruction + quantization (Rajput et al. 2023, section 3.1)."""
        return self.autoencode(self.normalized(x), temperature)

    def autoencode(self, x: Tensor, temperature: float | Tensor = 1.0) -> RqVaeLosses:
        """What `forward` gives, of features as `normalized` returns them."""
        latent = self.encoder(self._without_interactions(x) if self.training else x)
        if self.training and self.plain and has_kernel(latent.device, latent.dtype):
            from ops.triton.quantize import residual_quantize

            books = torch.stack([layer.embedding.weight for layer in self.layers]).float()
            beta = self.config["commitment_weight"]
            total, _, quantize_loss = residual_quantize(latent.float().contiguous(), books, beta)
        else:
            codes = self.quantize(latent, temperature)
            total, quantize_loss = codes.embeddings.sum(-1), codes.quantize_loss
        reconstruction = reconstruction_loss(self.decoder(total), x, self.n_cat_features).mean()
        quantization = quantize_loss.mean()
        return RqVaeLosses(reconstruction + quantization, reconstruction, quantization)

    def _without_interactions(self, x: Tensor) -> Tensor:
        """Normalized features [B, input_dim]: rows drawn anew have the mean in place of what interactions say."""
        if (share := self.config["drop_interactions"]) == 0:
            return x
        return x.masked_fill((torch.rand(len(x), 1, device=x.device) < share) & self.from_interactions, 0.0)

    @torch.no_grad()
    def codes(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """The nearest codes of N items, chunk by chunk, in inference mode.

        Computed in float64, with ties going to the lower code: the same weights give the same codes on every device
        and under every precision of training. Shape: x [N, input_dim] -> [N, L] int64, on the CPU.
        """
        exact = self.exact()
        chunks = stream(x, batch_size or self.chunk_rows, exact.device)
        none = torch.zeros(0, len(self.layers), dtype=torch.int64)
        return torch.cat([none, *(exact.get_semantic_ids(chunk.double()).sem_ids.cpu() for chunk in chunks)])

    def exact(self) -> "RqVae":
        """A copy in float64 and in evaluation mode, whose codes are those of every other device."""
        return copy.deepcopy(self).double().eval()

    @torch.no_grad()
    def losses(self, x: Tensor, batch_size: int | None = None) -> dict[str, float]:
        """Mean losses over a whole catalogue x [N, input_dim], in inference mode."""
        totals, model = torch.zeros(3, dtype=torch.float64), copy.deepcopy(self).eval()
        for chunk in stream(x, batch_size or self.chunk_rows, self.device):
            out = model(chunk)
            parts = torch.stack([out.loss, out.reconstruction_loss, out.quantize_loss])
            totals += parts.double().cpu() * len(chunk) / len(x)
        return dict(zip(("loss", "reconstruction_loss", "quantize_loss"), totals.tolist(), strict=True))

    @property
    def device(self) -> torch.device:
        return self.layers[0].embedding.weight.device

    @property
    def chunk_rows(self) -> int:
        """How many items of a catalogue are coded at a time. A CPU keeps few in its caches; a GPU is done with few
        before the host has launched its kernels, and gets more while their distances to all codes are up to 2^26."""
        if self.device.type == "cpu":
            return CHUNK
        return min(max(2**26 // self.config["codebook_size"], CHUNK), 8 * CHUNK)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into the folder."""
        save_pretrained(self, self.config, folder)

    @staticmethod
    def from_pretrained(
        path: str | Path, activation: str | None = None, revision: str | None = None, allow_pickle: bool = False
    ) -> "RqVae":
        """A tokenizer in evaluation mode.

        path: a folder that `save_pretrained` wrote, a Hub id (`owner/name`, at `revision`), or a folder, Hub id or
        `.pt` checkpoint of the original project. activation: "silu" or "relu", for the latter, whose files don't
        tell; None takes "silu" and says so. allow_pickle: run the code in a `.pt` file; off, only tensors,
        numbers and the original's mode are read from it.

        Raises FileNotFoundError where there is nothing or a file is missing, ValueError where one is damaged,
        ConnectionError where the Hub can't be reached and holds no cached copy.
        """
        path = resolve(path, revision)
        config, weights = read_checkpoint(path, allow_pickle) if path.is_file() else load_pretrained(path)
        if "activation" not in config:  # the original project's
            config = legacy_arguments(config, activation)
        elif activation not in (None, config["activation"]):
            raise ValueError(f"The tokenizer in {path} was trained with {config['activation']!r}, not {activation!r}.")
        try:
            if (distance := config.pop("codebook_distance", "l2")) != "l2":  # which earlier versions had
                raise ValueError(f"codebook_distance is {distance!r}, this code knows 'l2'")
            config["codebook_mode"] = QuantizeMode(config["codebook_mode"])
            model = RqVae(**config)
            model.load_state_dict(weights)
        except (TypeError, KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"The config and the weights in {path} do not make a tokenizer: {error}") from error
        return model.eval()

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Uploads config.json, model.safetensors and a card to a Hub repository, made if need be; returns its address.
        A whole tokenizer folder, semantic IDs and all, goes up with `modules.pretrained.push_folder`."""
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            write_file(Path(folder) / CARD, tokenizer_card(self.config).encode())
            return push_folder(folder, repo_id, private)
