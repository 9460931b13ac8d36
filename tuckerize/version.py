"""Version of the program and how it is installed; lower layers need not import the package."""

__version__ = "0.1.0"

INSTALL = "pip install PATH/TO/tuckerize"
"""Installs this program from its source checkout, for hints, model cards and their loader.

No package index has it: a bare name there would be somebody else's.
"""

INSTALL_NPU = "pip install 'PATH/TO/tuckerize[npu]'"
"""The same with what an Ascend NPU needs."""
