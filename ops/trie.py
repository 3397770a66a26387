"""Operations on one level of a prefix tree; the choice of kernel or twin is made here.

A level is two arrays: node n has the children first_child[n] to first_child[n+1] - 1, which are nodes of the level
below, and code[c] is the last code of node c of that level; the codes of siblings ascend.
"""

from torch import Tensor

from ops import reference
from ops.jagged import has_kernel


def children(first_child: Tensor, code: Tensor, nodes: Tensor, fanout: int) -> tuple[Tensor, Tensor, Tensor]:
    """The children of nodes, side by side. fanout: host integer, the largest number of children of a node.

    Shape: first_child [n+1], code [m], nodes [...] -> child nodes, their codes, and whether each exists: [..., fanout].
    Where a child does not exist, its node and code are those of the first child.
    """
    return reference.children(first_child, code, nodes, fanout)


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
