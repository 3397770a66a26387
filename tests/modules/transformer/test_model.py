"""Encoder and decoder against transformers' T5 with the same weights, and the decoder's cache."""

import torch
from transformers import T5Config, T5Model

from modules.transformer.attention import SelfAttention
from modules.transformer.model import Decoder, Encoder, KVCache, MemoryView, TransformerConfig
from ops.jagged import JaggedTensor, jagged_to_padded
from tests.ops.rows import jagged

CONFIG = TransformerConfig(dim=12, ff_dim=20, n_heads=3, head_dim=5, dropout=0.1)
LENGTHS, LAYERS = [7, 1, 150, 4], 2


def make(causal: bool) -> tuple[Encoder, Decoder]:
    """With noise for all weights, in evaluation mode."""
    stacks = Encoder(CONFIG, LAYERS, causal, drop_output=True).double().eval(), Decoder(CONFIG, LAYERS).double().eval()
    with torch.no_grad():
        for stack in stacks:
            for parameter in stack.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return stacks


def random_rows(lengths: list[int]) -> JaggedTensor:
    return jagged([torch.randn(length, CONFIG.dim, dtype=torch.float64) for length in lengths])


def copy_attention(layer, oracle) -> None:
    if isinstance(layer, SelfAttention):
        query, key, value = layer.query_key_value.weight.chunk(3)
    else:
        query, key, value = layer.query.weight, *layer.key_value.weight.chunk(2)
    oracle.q.weight.copy_(query * CONFIG.head_dim**-0.5)  # T5 leaves the scores unscaled
    oracle.k.weight.copy_(key)
    oracle.v.weight.copy_(value)
    oracle.o.weight.copy_(layer.out.weight)


def copy_ff(block, oracle) -> None:
    oracle.layer_norm.weight.copy_(block.ff_norm.weight)
    oracle.DenseReluDense.wi.weight.copy_(block.ff.wide.weight)
    oracle.DenseReluDense.wo.weight.copy_(block.ff.narrow.weight)


def copy_self_attention(stack, blocks) -> None:
    """Self-attention, feed-forward and the final normalization of all layers."""
    norm = blocks.input_norm
    for block, twin in zip(blocks.blocks, stack.block, strict=True):
        twin.layer[0].layer_norm.weight.copy_(norm.weight)
        norm = block.out_norm
        copy_attention(block.attention, twin.layer[0].SelfAttention)
        copy_ff(block, twin.layer[-1])
    stack.final_layer_norm.weight.copy_(norm.weight)


def t5() -> T5Model:
    sizes = dict(d_model=CONFIG.dim, d_kv=CONFIG.head_dim, d_ff=CONFIG.ff_dim, num_heads=CONFIG.n_heads)
    return T5Model(T5Config(vocab_size=2, num_layers=LAYERS, feed_forward_proj="relu", **sizes)).double().eval()


@torch.no_grad()
def test_both_stacks_are_those_of_t5():
    encoder, decoder = make(causal=False)
    decoder.bias.table.weight.zero_()  # T5 has a position bias in the decoder's self-attention only
    oracle = t5()
    copy_self_attention(oracle.encoder, encoder)
    oracle.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.copy_(encoder.bias.table.weight)
    copy_self_attention(oracle.decoder, decoder)
    oracle.decoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.zero_()
    for block, twin in zip(decoder.blocks, oracle.decoder.block, strict=True):
        twin.layer[1].layer_norm.weight.copy_(block.cross_norm.weight)
        copy_attention(block.cross_attention, twin.layer[1].EncDecAttention)
    history = random_rows(LENGTHS)
    targets = torch.randn(len(LENGTHS), 4, CONFIG.dim, dtype=torch.float64)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    encoded = encoder(history)
    view = MemoryView(torch.arange(len(LENGTHS) + 1), 1, torch.tensor(LENGTHS).repeat_interleave(4))
    decoded, _ = decoder(targets, decoder.memory(encoded), view)
    expected = oracle(
        inputs_embeds=jagged_to_padded(history.values, history.offsets, history.max_length),
        attention_mask=mask,
        decoder_inputs_embeds=targets,
    )
    # T5 normalizes and takes its softmax in float32, whatever the weights.
    torch.testing.assert_close(encoded.values, expected.encoder_last_hidden_state[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(decoded, expected.last_hidden_state, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_causal_encoder_is_the_self_attention_of_the_decoder_of_t5():
    encoder, _ = make(causal=True)
    oracle = t5().decoder  # given no encoder states, it leaves their attention out
    copy_self_attention(oracle, encoder)
    oracle.block[0].layer[0].SelfAttention.relative_attention_bias.weight.copy_(encoder.bias.table.weight)
    history = random_rows(LENGTHS)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    expected = oracle(
        inputs_embeds=jagged_to_padded(history.values, history.offsets, history.max_length), attention_mask=mask
    ).last_hidden_state
    torch.testing.assert_close(encoder(history).values, expected[mask], rtol=1e-5, atol=1e-5)


def test_the_causal_encoding_of_a_prefix_is_the_prefix_of_the_encoding():
    row = torch.randn(9, CONFIG.dim, dtype=torch.float64)
    prefixes = jagged([row[: length + 1] for length in range(9)])
    for causal in (True, False):
        encoder, _ = make(causal)
        together = encoder(jagged([row])).values
        difference = float((together - encoder(prefixes).values[prefixes.offsets[1:] - 1]).detach().abs().max())
        assert difference < 1e-10 if causal else difference > 1e-3


def test_decoding_step_by_step_is_decoding_at_once():
    """Users have 2, 0 and 3 sequences, which see their own memory and not all of it."""
    encoder, decoder = make(causal=True)
    memory = decoder.memory(encoder(random_rows([6, 6, 6])))
    x, offsets = torch.randn(5, 4, CONFIG.dim, dtype=torch.float64), torch.tensor([0, 2, 2, 5])
    limits = torch.randint(1, 7, (5, 4))
    whole, seen = decoder(x, memory, MemoryView(offsets, 3, limits.flatten()))
    cache = None
    for step in range(4):
        view = MemoryView(offsets, 3, limits[:, step].contiguous())
        out, tokens = decoder(x[:, step : step + 1], memory, view, cache)
        torch.testing.assert_close(out[:, 0], whole[:, step], rtol=1e-10, atol=1e-10)
        for stepped, at_once in zip(tokens, seen, strict=True):
            torch.testing.assert_close(stepped, at_once.unflatten(0, (5, 4))[:, step])
        cache = KVCache.extend(cache, tokens, torch.arange(5))


def test_sequences_may_continue_any_others():
    """Two steps of three sequences, then four that continue some of them, against each decoded alone."""
    encoder, decoder = make(causal=True)
    memory = decoder.memory(encoder(random_rows([6])))
    first, second, third = (torch.randn(n, 1, CONFIG.dim, dtype=torch.float64) for n in (3, 3, 4))
    parents, grandparents = torch.tensor([2, 0, 2, 1]), torch.tensor([1, 1, 0])
    cache, outs = None, []
    for x, chosen in ((first, grandparents), (second, parents), (third, torch.arange(4))):
        view = MemoryView(torch.tensor([0, len(x)]), len(x), torch.full((len(x),), 6))
        out, tokens = decoder(x, memory, view, cache)
        cache = KVCache.extend(cache, tokens, chosen)
        outs.append(out)
    for sequence, parent in enumerate(parents.tolist()):
        steps = first[grandparents[parent]], second[parent], third[sequence]
        alone, _ = decoder(torch.cat(steps)[None], memory, MemoryView(torch.tensor([0, 1]), 1, torch.full((3,), 6)))
        torch.testing.assert_close(outs[2][sequence, 0], alone[0, 2], rtol=1e-10, atol=1e-10)


def test_each_sequence_looks_at_what_it_may_see_of_its_user_and_from_there():
    """A memory cut at the limit, alone in its batch, gives the same: also the position bias counts from the cut."""
    encoder, decoder = make(causal=True)
    rows = random_rows([5, 2])
    x = torch.randn(3, 4, CONFIG.dim, dtype=torch.float64)
    limits = [4, 1, 2]
    view = MemoryView(torch.tensor([0, 1, 3]), 2, torch.tensor(limits).repeat_interleave(4))
    together, _ = decoder(x, decoder.memory(encoder(rows)), view)
    for sequence, user in enumerate([0, 1, 1]):
        row = rows.values[rows.offsets[user] :][: limits[sequence]]
        own = decoder.memory(encoder(jagged([row])))
        view = MemoryView(torch.tensor([0, 1]), 1, torch.full((4,), len(row)))
        alone, _ = decoder(x[sequence : sequence + 1], own, view)
        torch.testing.assert_close(together[sequence], alone[0], rtol=1e-10, atol=1e-10)
