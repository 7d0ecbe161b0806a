"""What processes started by tests need to know."""

import os
from pathlib import Path

SUPPORT = Path(__file__).parent
ROOT = SUPPORT.parents[1]


def pythonpath() -> str:
    """PYTHONPATH of a process that imports from tests/support, and fused_losses from this tree."""
    inherited = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(SUPPORT), str(ROOT), *([inherited] if inherited else [])])
