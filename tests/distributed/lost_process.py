"""Under torchrun: verify, in which process 1 is killed or hangs in front of the first layer.

Usage: lost_process.py killed|hangs verify OUT
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tuckerize.cli import main
from tuckerize.pipeline.verify import verification as verify

work = verify._sharding_error


def lost(*arguments: Any) -> float:  # noqa: ANN401
    """End, or wait for ever, on process 1."""
    if os.environ["RANK"] == "1":
        if HOW == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()
    return work(*arguments)


if __name__ == "__main__":
    HOW = sys.argv.pop(1)
    vars(verify)["_sharding_error"] = lost
    main()
