"""Version of the program and how it is installed; lower layers need not import the package."""

from importlib import metadata

__version__ = "0.2.0"

INSTALL = "pip install PATH/TO/tuckerize"
"""Installs this program from its source checkout, for hints, model cards and their loader.

No package index has it: a bare name there would be somebody else's.
"""

INSTALL_NPU = "pip install 'PATH/TO/tuckerize[npu]'"
"""The same with what an Ascend NPU needs."""


def installed_version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
