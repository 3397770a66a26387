"""RQ-VAE: an autoencoder whose latent vector is a sum of one code per level (Lee et al. 2022; Rajput et al. 2023)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import gin
import torch
from torch import Tensor, nn

from modules.encoder import MLP
from modules.kmeans import kmeans
from modules.loss import reconstruction_loss
from modules.normalize import Standardize
from modules.pretrained import load_pretrained, save_pretrained
from modules.quantize import Quantize, QuantizeMode


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
    """Batch means, float32 scalars; sem_ids [B, L] int64."""

    loss: Tensor
    reconstruction_loss: Tensor
    quantize_loss: Tensor
    sem_ids: Tensor


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    yield
    model.train(training)


@gin.configurable
class RqVae(nn.Module):
    """Residual-quantized autoencoder.

    input_dim: columns of the features; hidden_dims: of the encoder, mirrored in the decoder; embed_dim: of the
    latent and of every codebook vector; codebook_size: vectors a level; n_layers: levels L.
    n_cat_features: how many trailing columns are multi-hot categories, reconstructed as logits.
    standardize: "column" (each column to mean 0 and deviation 1), "global" (each column to mean 0, one
    deviation for all) or "none"; the constants are fitted by `initialize` and stored with the weights.
    """

    def __init__(
        self,
        input_dim: int,
        embed_dim: int = 32,
        hidden_dims: tuple[int, ...] = (512, 256, 128),
        codebook_size: int = 256,
        n_layers: int = 3,
        n_cat_features: int = 0,
        codebook_mode: QuantizeMode = QuantizeMode.ROTATION_TRICK,
        codebook_kmeans_init: bool = True,
        commitment_weight: float = 0.25,
        standardize: str = "global",
        activation: str = "silu",
    ) -> None:
        super().__init__()
        if standardize not in ("column", "global", "none"):
            raise ValueError(f"RqVae.standardize is {standardize!r}; it can be 'column', 'global' or 'none'.")
        if not 0 <= n_cat_features < input_dim:
            raise ValueError(f"RqVae.n_cat_features is {n_cat_features}; the input has {input_dim} columns.")
        self.config = {
            "input_dim": input_dim,
            "embed_dim": embed_dim,
            "hidden_dims": list(hidden_dims),
            "codebook_size": codebook_size,
            "n_layers": n_layers,
            "n_cat_features": n_cat_features,
            "codebook_mode": codebook_mode.value,
            "codebook_kmeans_init": codebook_kmeans_init,
            "commitment_weight": commitment_weight,
            "standardize": standardize,
            "activation": activation,
        }
        self.n_cat_features = n_cat_features
        dims = [input_dim, *hidden_dims, embed_dim]
        self.standardize = Standardize(input_dim - n_cat_features) if standardize != "none" else None
        self.encoder = MLP(dims, activation)
        self.decoder = MLP(dims[::-1], activation)
        self.layers = nn.ModuleList(
            Quantize(embed_dim, codebook_size, codebook_mode, commitment_weight) for _ in range(n_layers)
        )
        self._init_weights()

    def _init_weights(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
            elif isinstance(module, nn.Embedding):
                nn.init.uniform_(module.weight, -1.0, 1.0)

    @torch.no_grad()
    def initialize(self, x: Tensor, generator: torch.Generator) -> None:
        """Fits what is fitted before training: the standardization, and the codebooks.

        x: [N, input_dim], a sample of the features, at least codebook_size rows. generator: on the device of x.
        """
        if self.standardize is not None:
            self.standardize.fit(x[:, : len(self.standardize.mean)], self.config["standardize"] == "column")
        if self.config["codebook_kmeans_init"]:
            self.fit_codebooks(x, generator)

    @torch.no_grad()
    def fit_codebooks(self, x: Tensor, generator: torch.Generator) -> None:
        """Replaces each level's codebook by the k-means centroids of its residuals. Arguments as of `initialize`.

        Gradient steps move a code only while it is chosen, so codes die as the encoder moves away from them;
        k-means spreads them over the residuals again, and minimizes the same squared distance.
        """
        residual = self.encode(x)
        for layer in self.layers:
            clusters = kmeans(residual, self.config["codebook_size"], generator)
            layer.codebook.copy_(clusters.centroids)
            residual = residual - clusters.centroids[clusters.assignment]

    def normalized(self, x: Tensor) -> Tensor:
        """Features as the autoencoder sees them, categories untouched. Shape: [B, input_dim] both."""
        if self.standardize is None:
            return x
        split = len(self.standardize.mean)
        return torch.cat([self.standardize(x[:, :split]), x[:, split:]], dim=1)

    def encode(self, x: Tensor) -> Tensor:
        """[B, input_dim] -> [B, embed_dim]."""
        return self.encoder(self.normalized(x))

    def decode(self, latent: Tensor) -> Tensor:
        """[B, embed_dim] -> [B, input_dim] in the units of the input; categories as probabilities."""
        decoded = self.decoder(latent)
        split = decoded.shape[1] - self.n_cat_features
        values, logits = decoded[:, :split], decoded[:, split:]
        if self.standardize is not None:
            values = self.standardize.inverse(values)
        return torch.cat([values, logits.sigmoid()], dim=1)

    def quantize(self, latent: Tensor, temperature: float = 1.0) -> SemanticIdOutput:
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
        """x: features [B, input_dim]."""
        return self.quantize(self.encode(x), temperature)

    def forward(self, x: Tensor, temperature: float = 1.0) -> RqVaeLosses:
        """x: features [B, input_dim]. loss = reconstruction + quantization (Rajput et al. 2023, section 3.1)."""
        x = self.normalized(x)
        codes = self.quantize(self.encoder(x), temperature)
        predicted = self.decoder(codes.embeddings.sum(-1))
        reconstruction = reconstruction_loss(predicted, x, self.n_cat_features).mean()
        quantization = codes.quantize_loss.mean()
        return RqVaeLosses(reconstruction + quantization, reconstruction, quantization, codes.sem_ids)

    @torch.no_grad()
    def codes(self, x: Tensor, batch_size: int = 65536) -> Tensor:
        """Codes of a whole catalogue, chunk by chunk, in inference mode.

        Shape: x [N, input_dim] -> [N, L] int64, on the CPU.
        """
        with _inference(self):
            return torch.cat([self.get_semantic_ids(chunk).sem_ids.cpu() for chunk in self._chunks(x, batch_size)])

    @torch.no_grad()
    def losses(self, x: Tensor, batch_size: int = 65536) -> dict[str, float]:
        """Mean losses over a whole catalogue x [N, input_dim], in inference mode."""
        totals = torch.zeros(3, dtype=torch.float64)
        with _inference(self):
            for chunk in self._chunks(x, batch_size):
                out = self(chunk)
                parts = torch.stack([out.loss, out.reconstruction_loss, out.quantize_loss])
                totals += parts.double().cpu() * len(chunk) / len(x)
        return dict(zip(("loss", "reconstruction_loss", "quantize_loss"), totals.tolist(), strict=True))

    def _chunks(self, x: Tensor, batch_size: int) -> Iterator[Tensor]:
        return (chunk.to(self.layers[0].codebook.device) for chunk in x.split(batch_size))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors` into the folder."""
        save_pretrained(self, self.config, folder)

    @staticmethod
    def from_pretrained(folder: str | Path) -> "RqVae":
        """Reads what `save_pretrained` wrote, in evaluation mode; see `modules.pretrained.load_pretrained`."""
        config, weights = load_pretrained(folder)
        config["codebook_mode"] = QuantizeMode(config["codebook_mode"])
        model = RqVae(**config)
        model.load_state_dict(weights)
        return model.eval()
