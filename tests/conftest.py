"""Settings of every test."""

from __future__ import annotations

import torch

# The tensors of tests are small. With several threads each product waits for all of them, for a
# whole time slice of the scheduler where another process holds a core.
torch.set_num_threads(1)
