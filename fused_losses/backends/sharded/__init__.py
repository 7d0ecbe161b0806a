"""Losses where the vocabulary is spread over the ranks of a process group, by their rows of the head.

Each rank takes a chunk of tokens through the steps of the backend that a whole head would have (`cpu`, `torch`; the
products of entries also `triton` and `cuda`) as though its rows were all there are. What makes its results those of
the whole vocabulary is a few numbers per token, gathered from all ranks: `whole`. The backends here have the names
"sharded.cpu", "sharded.torch", ...; `backends.load` takes them, and `shards.agreement` sees to it that all ranks take
the same.

A sparse softmax: the log-sum-exp of all ranks is known before entries are chosen, so those of a rank are the ones that
one process would keep of its rows. They stay there. Of the rest the ranks add up its mass, its norms and, in the
gradient of the hidden states, which is one sum over all ranks, its share in the directions of the head.
"""
