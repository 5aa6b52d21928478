"""Show that imports point down only: packages side by side on visionkernels, no circles, no Triton outside it.

The contracts are made from the folders and handed to import-linter, so that a new package is bound by them at once.
"""

import sys
import tempfile
from pathlib import Path

from importlinter.cli import lint_imports

from workspace import SHARED, packages


def contracts() -> str:
    """The import-linter configuration for the packages that are present."""
    names = [package.name for package in packages()]
    roots = "\n    ".join([SHARED.name, *names])
    sources = "\n    ".join(names)
    return f"""\
[importlinter]
root_packages =
    {roots}
include_external_packages = True
exclude_type_checking_imports = True

[importlinter:contract:layers]
name = No package imports another; visionkernels imports none
type = layers
layers =
    {" | ".join(names)}
    {SHARED.name}

[importlinter:contract:circles]
name = No modules or folders import each other in a circle
type = acyclic_siblings
ancestors =
    {roots}

[importlinter:contract:triton]
name = Triton is imported by visionkernels alone
type = forbidden
source_modules =
    {sources}
forbidden_modules =
    triton
allow_indirect_imports = True
"""


def main() -> int:
    # import-linter finds packages where Python would: this checkout before any installed one
    sys.path[:0] = [str(project.folder / "src") for project in (SHARED, *packages())]
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "contracts.ini")
        config.write_text(contracts())
        return lint_imports(config_filename=str(config), no_cache=True)


if __name__ == "__main__":
    sys.exit(main())
