"""The multi-layer perceptron of the autoencoder."""

import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"relu": nn.ReLU, "silu": nn.SiLU}


class MLP(nn.Module):
    """Linear layers without bias, an activation between them, none after the last.

    normalize: the output has length 1.
    Shape: [..., dims[0]] -> [..., dims[-1]]. The layers sit at `mlp.0`, `mlp.2`, `mlp.4`, ...
    """

    def __init__(self, dims: list[int], activation: str, normalize: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for dim_in, dim_out in zip(dims[:-1], dims[1:], strict=True):
            layers += [nn.Linear(dim_in, dim_out, bias=False), ACTIVATIONS[activation]()]
        self.mlp = nn.Sequential(*layers[:-1])
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp(x)
        return F.normalize(x, dim=-1) if self.normalize else x
