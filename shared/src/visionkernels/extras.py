"""Optional dependencies: imported where they are used, and missing ones named with the pip line."""

import importlib
from typing import Any

__all__ = ["require"]


def require(module: str, install: str) -> Any:
    """Return the module `module`; `install` is what pip must be given where it is missing.

    Example: `timm = require("timm", "visionkernels[train]")`. Raises ImportError with the pip line.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # a dependency that is missing inside an installed module is that module's own story
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ImportError(f"{error.name} is not installed; run: pip install '{install}'", name=error.name) from error
