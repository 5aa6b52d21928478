"""The search for the contents of a file: `job` is what all attempts share, and `targets` what they must meet.

Each layer has a module that adds it to the contents of a file: `tree_layer`, `residual_layer` and `exact_layer`;
`candidate` measures what comes out. `tinc.compression` chooses between them.
"""
