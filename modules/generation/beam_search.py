"""Deterministic beam search over the items of a trie."""

import torch

from data.schemas import RankedItems, TokenizedSeqBatch
from modules.generation.trie import Trie
from modules.model import EncoderDecoderRetrievalModel


@torch.no_grad()
def beam_search(model: EncoderDecoderRetrievalModel, batch: TokenizedSeqBatch, trie: Trie, beams: int) -> RankedItems:
    """The `beams` best items of every user, by log-probability; exact where no level has more prefixes than beams.

    Every beam walks the trie, so each result is an item of the catalogue. Where a user has fewer than `beams`
    reachable items the rest is -1 with log-probability -inf.

    Shape: B users -> items, log_probs [B, min(beams, N)].
    """
    users, device = batch.user.shape[0], batch.user.device
    memory = model.memory(batch)
    nodes = torch.zeros(users, 1, dtype=torch.int64, device=device)
    scores = torch.zeros(users, 1, device=device)
    codes, cache = None, None
    for level in range(trie.n_levels):
        logits, cache = model.next_code(codes, level, memory, cache)  # [B, K, V]
        log_probs, child, code = trie.log_probs(logits, level, nodes)  # [B, K, fanout]
        total = (scores[..., None] + log_probs).flatten(1)  # [B, K * fanout]
        kept = min(beams, total.shape[1], len(trie.code[level]))
        scores, best = total.topk(kept, dim=1)  # sorted, best first
        nodes, codes = child.flatten(1).gather(1, best), code.flatten(1).gather(1, best)
        parent = best // trie.fanout[level] + torch.arange(users, device=device)[:, None] * logits.shape[1]
        cache = [(keys[parent.flatten()], values[parent.flatten()]) for keys, values in cache]
    items = trie.leaf_items[nodes].masked_fill(scores == float("-inf"), -1)
    return RankedItems(items, scores)
