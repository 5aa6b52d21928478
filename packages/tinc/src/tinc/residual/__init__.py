"""The residual layer: what the tree leaves, or the whole signal, as quantised cosine transforms of blocks.

In the order of encoding: `design` chooses the blocks, `blocks` cuts the volume, `fill` continues it beyond the mask,
`transform` goes to frequencies, `quantizer` chooses levels, `mask` and `coefficients` code them, `encoder` runs all of
it at a step, and `decoder` inverts it for a region.
"""
