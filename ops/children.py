"""Softmax over the children of trie nodes; the choice of kernel or twin is made here."""

import torch
from torch import Tensor

from ops import reference
from ops.jagged import has_kernel


def child_log_probs(logits: Tensor, nodes: Tensor, first_child: Tensor, code: Tensor, fanout: int) -> Tensor:
    """Log-probabilities of the children of each node: a softmax over those of the logits whose code a child has.

    first_child, code: of one depth; see `modules.generation.trie.Trie`. fanout: the most children a node has.

    Shape: logits [..., V], nodes [...], first_child [n + 1], code [m] -> [..., fanout] float32, -inf where a node has
    fewer children. The gradient, where one is wanted, is that of the pure-torch twin.
    """
    arguments = (logits, nodes, first_child, code, fanout)
    if not has_kernel(logits) or (torch.is_grad_enabled() and logits.requires_grad):
        return reference.child_log_probs(*arguments)
    from ops.triton import children

    return children.child_log_probs(*arguments)
