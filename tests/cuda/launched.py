"""What a launcher starts in `test_entry_points.py`: it writes down what it was given, and stays until it is told to go.

RECORD names the folder: a file for each process, and `done` when they may end.
"""

import json
import os
import sys
import time
from pathlib import Path

place = Path(os.environ["RECORD"])
unfinished = place / f"{os.getpid()}.partial"
unfinished.write_text(json.dumps({"environment": dict(os.environ), "words": sys.argv[1:]}))
unfinished.rename(place / f"{os.getpid()}.json")
until = time.monotonic() + 300
while not (place / "done").exists() and time.monotonic() < until:
    time.sleep(0.1)
