"""What stands in for parts of the engine, in every one of its workers: each imports this module."""

from __future__ import annotations

import os

from tests.vllm import ascend, reference

KERNELS, ASCEND = "TUCKERIZE_TEST_REFERENCE_KERNELS", "TUCKERIZE_TEST_ASCEND"
"""Variables that ask for reference.py, and for a release of ascend.py."""


class StandIns:
    """Extension of a worker, without any method."""


if KERNELS in os.environ:
    reference.offer()
if ASCEND in os.environ:
    ascend.install(os.environ[ASCEND])
