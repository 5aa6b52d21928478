"""The run-time checker of annotated types and shapes, for `pytest --jaxtyping-packages=NAME,...typechecking.check`."""

from beartype import BeartypeConf, beartype

__all__ = ["check"]

check = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int where a float is due, as mypy has it
