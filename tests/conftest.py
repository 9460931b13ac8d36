"""Settings and fixtures of every test."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# Written by the program, and scripts of processes that have vLLM or atheris.
collect_ignore_glob = ["golden/*", "vllm/[!t]*", "fuzz/guided.py"]

# The tensors of tests are small. With several threads each product waits for all of them, for a
# whole time slice of the scheduler where another process holds a core. So it is for the processes
# that tests start, above all where a container sees more cores than it may use.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

# A shell ignores Ctrl-C for what it starts in the background, and so would all that is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine must not fail a test by its time.
settings.register_profile("tuckerize", deadline=None)
settings.load_profile("tuckerize")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny bfloat16 model in one weight file: 3 layers, of which 1 and 2 are MoE layers."""
    from tests.tiny_models import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def tiny_sharded_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in float32 and in several weight files with an index."""
    from tests.tiny_models import make_tiny_model

    folder = tmp_path_factory.mktemp("tiny") / "sharded"
    return make_tiny_model(folder, dtype=torch.float32, shards=True)
