"""The search for the contents of a file that meet a target.

`targets` defines the target, and `job` what all attempts share. `tree_layer`, `residual_layer` and `exact_layer` add
layers to the contents, `candidate` measures the result, and `tinc.compression` chooses among the layers.
"""
