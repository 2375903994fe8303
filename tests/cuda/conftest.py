"""The ranks of the distributed tests serve here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))
sys.path.insert(0, str(Path(__file__).parent))
