"""Encoder and decoder against transformers' T5 with the same weights, and the decoder's cache."""

import pytest
import torch
from transformers import T5Config, T5Model

from modules.transformer.model import Decoder, Encoder, MemoryView, TransformerConfig
from ops.jagged import JaggedTensor

CONFIG = TransformerConfig(dim=12, ff_dim=20, n_heads=3, head_dim=5, dropout=0.1)
LENGTHS, LAYERS = [7, 1, 150, 4], 2


@pytest.fixture
def stacks() -> tuple[Encoder, Decoder]:
    """With noise for all weights, in evaluation mode."""
    torch.manual_seed(0)
    stacks = Encoder(CONFIG, LAYERS).double().eval(), Decoder(CONFIG, LAYERS).double().eval()
    with torch.no_grad():
        for stack in stacks:
            for parameter in stack.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return stacks


def copy_attention(layer, oracle) -> None:
    key, value = layer.key_value.weight.chunk(2)
    oracle.q.weight.copy_(layer.query.weight * CONFIG.head_dim**-0.5)  # T5 leaves the scores unscaled
    oracle.k.weight.copy_(key)
    oracle.v.weight.copy_(value)
    oracle.o.weight.copy_(layer.out.weight)


def copy_ff(block, oracle) -> None:
    oracle.layer_norm.weight.copy_(block.ff_norm.weight)
    oracle.DenseReluDense.wi.weight.copy_(block.ff.wide.weight)
    oracle.DenseReluDense.wo.weight.copy_(block.ff.narrow.weight)


@torch.no_grad()
def t5(encoder: Encoder, decoder: Decoder) -> T5Model:
    oracle = T5Model(
        T5Config(
            vocab_size=2,
            d_model=CONFIG.dim,
            d_kv=CONFIG.head_dim,
            d_ff=CONFIG.ff_dim,
            num_heads=CONFIG.n_heads,
            num_layers=LAYERS,
            feed_forward_proj="relu",
        )
    )
    oracle = oracle.double().eval()
    for block, twin in zip(encoder.blocks, oracle.encoder.block, strict=True):
        twin.layer[0].layer_norm.weight.copy_(block.attention_norm.weight)
        copy_attention(block.attention, twin.layer[0].SelfAttention)
        copy_ff(block, twin.layer[1])
    for block, twin in zip(decoder.blocks, oracle.decoder.block, strict=True):
        twin.layer[0].layer_norm.weight.copy_(block.attention_norm.weight)
        copy_attention(block.attention, twin.layer[0].SelfAttention)
        twin.layer[1].layer_norm.weight.copy_(block.cross_norm.weight)
        copy_attention(block.cross_attention, twin.layer[1].EncDecAttention)
        copy_ff(block, twin.layer[2])
    oracle.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.copy_(encoder.bias.table.weight)
    oracle.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()  # we have none there
    oracle.encoder.final_layer_norm.weight.copy_(encoder.norm.weight)
    oracle.decoder.final_layer_norm.weight.copy_(decoder.norm.weight)
    return oracle


def test_both_stacks_are_those_of_t5(stacks):
    encoder, decoder = stacks
    history = JaggedTensor.from_rows([torch.randn(length, CONFIG.dim, dtype=torch.float64) for length in LENGTHS])
    targets = torch.randn(len(LENGTHS), 4, CONFIG.dim, dtype=torch.float64)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    with torch.no_grad():
        encoded = encoder(history, None)
        view = MemoryView(torch.arange(len(LENGTHS) + 1), 1)
        decoded, _ = decoder(targets, decoder.memory(encoded), view)
        expected = t5(encoder, decoder)(
            inputs_embeds=history.to_padded(3.0), attention_mask=mask, decoder_inputs_embeds=targets
        )
    # T5 normalizes and takes its softmax in float32, whatever the weights.
    torch.testing.assert_close(encoded.values, expected.encoder_last_hidden_state[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoded, expected.last_hidden_state, rtol=1e-5, atol=1e-5)


def test_a_causal_encoder_sees_nothing_of_the_future(stacks):
    encoder, _ = stacks
    row = torch.randn(9, CONFIG.dim, dtype=torch.float64)
    prefixes = JaggedTensor.from_rows([row[: length + 1] for length in range(9)])
    together = encoder(JaggedTensor.from_rows([row]), torch.arange(9) + 1).values
    alone = encoder(prefixes, prefixes.positions() + 1).values[prefixes.offsets[1:] - 1]
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    bidirectional = encoder(prefixes, None).values[prefixes.offsets[1:] - 1]
    assert float((bidirectional - together).detach().abs().max()) > 1e-3


def test_decoding_step_by_step_is_decoding_at_once(stacks):
    """Users have 2, 0 and 3 sequences, which see their own memory and not all of it."""
    encoder, decoder = stacks
    memory = decoder.memory(encoder(JaggedTensor.from_rows(list(torch.randn(3, 6, CONFIG.dim).double())), None))
    x, offsets = torch.randn(5, 4, CONFIG.dim, dtype=torch.float64), torch.tensor([0, 2, 2, 5])
    limits = torch.randint(1, 7, (5, 4))
    whole, seen = decoder(x, memory, MemoryView(offsets, 3, limits.flatten()))
    cache = None
    for step in range(4):
        view = MemoryView(offsets, 3, limits[:, step].contiguous())
        out, cache = decoder(x[:, step : step + 1], memory, view, cache)
        torch.testing.assert_close(out[:, 0], whole[:, step], rtol=1e-10, atol=1e-10)
    for (keys, values), (all_keys, all_values) in zip(cache, seen, strict=True):
        torch.testing.assert_close(keys, all_keys)
        torch.testing.assert_close(values, all_values)


def test_each_sequence_looks_at_the_memory_of_its_user(stacks):
    encoder, decoder = stacks
    rows = [torch.randn(length, CONFIG.dim, dtype=torch.float64) for length in (5, 2)]
    x = torch.randn(3, 4, CONFIG.dim, dtype=torch.float64)
    memory = decoder.memory(encoder(JaggedTensor.from_rows(rows), None))
    together, _ = decoder(x, memory, MemoryView(torch.tensor([0, 1, 3]), 2))
    for sequence, user in enumerate([0, 1, 1]):
        own = decoder.memory(encoder(JaggedTensor.from_rows([rows[user]]), None))
        alone, _ = decoder(x[sequence : sequence + 1], own, MemoryView(torch.tensor([0, 1]), 1))
        torch.testing.assert_close(together[sequence], alone[0], rtol=1e-10, atol=1e-10)
