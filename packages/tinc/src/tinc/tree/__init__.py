"""The tree of a file (TINC, sec. 3): coordinate networks on the nodes of a tree, with integer weights.

A volume is split level by level into equal boxes. Each node owns a few layers, and the function of a leaf is the
composition of the layers on its path from the root. All leaves use the same coordinates, from -1 to 1 over the leaf, so
that the features of an inner node are computed once for the leaves below it. A leaf may be a constant instead.

In the order of encoding: `shape` describes a tree, `design` chooses the shape for a number of bytes, `fitting` trains
it with the optimiser of `soap`, `quantized` is the result in integers and evaluates it, `weights` codes it.
"""
