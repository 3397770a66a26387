"""The fused operations as parts of a CUDA graph: a replay on other inputs gives the bits of a call."""

import pytest
import torch

from ops.embedding import embed_codes
from ops.trie import trie_cross_entropy


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replay_gives_the_bits_of_a_call():
    tokens, sizes = 3000, (256, 70)
    starts, first_child = torch.tensor([0, 256]).cuda(), torch.tensor([0, 200, 256], dtype=torch.int32).cuda()
    code = torch.cat([torch.arange(200), torch.arange(56)]).int().cuda()
    leaves = [torch.randn(n, 48, device="cuda", requires_grad=True) for n in (sum(sizes), 1000)]
    nodes, targets = torch.tensor([0, 1] * (tokens // 2)).cuda(), torch.tensor([7, 200] * (tokens // 2)).cuda()

    def draw() -> torch.Tensor:
        return torch.stack([torch.randint(size, (tokens,), device="cuda") for size in sizes], 1)

    def step(codes: torch.Tensor) -> list[torch.Tensor]:
        logits = embed_codes(codes, starts, *leaves).flatten(1) @ projection
        losses = trie_cross_entropy(logits, first_child, code, nodes, targets, 200)
        return [losses, *torch.autograd.grad(losses.mean(), leaves)]

    projection, codes = torch.randn(96, 256, device="cuda") / 10, draw()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(codes)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step(codes)
    for _ in range(3):
        codes.copy_(draw())
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(outputs, step(codes), strict=True))
