"""Operations on one level of a prefix tree; the choice of kernel or twin is made here.

A level is two arrays: node n has the children first_child[n] to first_child[n+1] - 1, which are nodes of the level
below, and code[c] is the last code of node c of that level; the codes of siblings ascend.
"""

from torch import Tensor

from ops import reference
from ops.jagged import has_kernel


def child_log_probs(logits: Tensor, first_child: Tensor, code: Tensor, nodes: Tensor, fanout: int) -> Tensor:
    """Log-probabilities of the children of each node: a softmax over the logits of their codes. No gradient on a GPU.

    out[r, j] = logits[r, c(j)] - log(sum over children i of exp(logits[r, c(i)])), c(j) = code[first_child[node] + j]

    Shape: logits [..., V], first_child [n+1], code [m], nodes [...] -> [..., fanout] in float32, or wider where the
    logits are; -inf where a node has fewer children. fanout: host integer, the largest number of children of a node.
    """
    arguments = (logits, first_child, code, nodes, fanout)
    if not has_kernel(logits):
        return reference.child_log_probs(*arguments)
    from ops.triton.trie import child_log_probs as kernel

    return kernel(*arguments)


def best_children(
    logits: Tensor,
    scores: Tensor,
    first_child: Tensor,
    code: Tensor,
    nodes: Tensor,
    fanout: int,
    count: int,
    left_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The children of a user's nodes with the highest scores, best first: one step of beam search. No gradient.

    A child's score is that of its node plus its log-probability, as in `child_log_probs`.

    Shape: logits [B, K, V], scores and nodes [B, K], first_child [n+1], code [m], left_out [B, K, fanout] bool, those
    not to choose -> scores [B, count] float32 or as wide as the logits, parents [B, count] int64, places of the nodes
    among the K, and children [B, count], nodes of the level below. count: at most K * fanout. Where too few children
    exist or are not left out, the rest has the score -inf. first_child (int32) and code are contiguous.
    """
    if has_kernel(logits):
        from ops.triton import trie

        if trie.chooses(nodes.shape[1], fanout, count):
            return trie.best_children(logits, scores, first_child, code, nodes, fanout, count, left_out)
    log_probs = child_log_probs(logits, first_child, code, nodes, fanout)
    return reference.best_children(log_probs, scores, first_child, nodes, count, left_out)


def trie_cross_entropy(
    logits: Tensor, first_child: Tensor, code: Tensor, nodes: Tensor, targets: Tensor, fanout: int
) -> Tensor:
    """-log of the probability of a node's target child, in a softmax over the codes of the node's children.

    loss[p] = log(sum over children c of nodes[p] of exp(logits[p, code[c]])) - logits[p, code[targets[p]]]

    It and its gradient are exactly 0 where the target is the only child; codes of no child get no gradient.

    Shape: logits [P, V], first_child [n+1], code [m], nodes [P], targets [P], children of the nodes, all integers
    -> [P] in float32, or wider where the logits are. fanout: host integer, the largest number of children of a node.
    """
    arguments = (logits, first_child, code, nodes, targets, fanout)
    if not has_kernel(logits):
        return reference.trie_cross_entropy(*arguments)
    from ops.triton.cross_entropy import trie_cross_entropy as kernel

    return kernel(*arguments)[0]
