"""Deterministic beam search over the items of a trie."""

import torch

from data.schemas import RankedItems, TokenizedSeqBatch
from data.utils import is_consumed
from modules.generation.trie import Trie
from modules.model import EncoderDecoderRetrievalModel
from modules.transformer.model import Past


@torch.no_grad()
def beam_search(model: EncoderDecoderRetrievalModel, batch: TokenizedSeqBatch, trie: Trie, beams: int) -> RankedItems:
    """The `beams` best items of every user, by log-probability; exact where no level has more prefixes than beams.

    Every beam walks the trie, so each result is an item of the catalogue, and none that `batch.consumed` lists.
    Where consumed items leave fewer than `beams`, the rest is -1 with log-probability -inf. The model should be
    in evaluation mode.

    Shape: B users -> items, log_probs [B, min(beams, N)].
    """
    users, device = batch.user.shape[0], batch.user.device
    memory = model.memory(batch)
    nodes = torch.zeros(users, 1, dtype=torch.int32, device=device)
    scores = torch.zeros(users, 1, device=device)
    codes = torch.zeros(users, 1, 0, dtype=torch.int64, device=device)
    past = None
    for level, fanout in enumerate(trie.fanout):
        logits, tokens = model.next_code(codes, memory, past)  # [B, K, V]
        last, left_out = level == trie.n_levels - 1, None
        if last and batch.consumed is not None:
            children = trie.child(level, nodes[..., None], torch.arange(fanout, device=device))  # [B, K, fanout]
            left_out = is_consumed(trie.leaf_items[children].flatten(1), batch.consumed).view_as(children)
        kept = min(beams, nodes.shape[1] * fanout, len(trie.code[level]))
        scores, parent, nodes = trie.best_children(logits, scores, level, nodes, kept, left_out)  # [B, kept]
        if not last:
            before = codes.gather(1, parent[..., None].expand(-1, -1, level))
            codes = torch.cat([before, trie.code[level][nodes].long()[..., None]], -1)
            rows = (parent + torch.arange(users, device=device)[:, None] * logits.shape[1]).flatten()
            past = Past.extend(past, tokens, rows)
    items = trie.leaf_items[nodes].long().masked_fill(scores == float("-inf"), -1)
    return RankedItems(items, scores)
