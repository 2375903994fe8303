"""What a launcher starts in `test_entry_points.py`: it writes down what it was given, and stays until it is told to go.

RECORD names the folder: a file for each process, and `done` when they may end.
"""

import json
import os
import sys
import time
from pathlib import Path

place = Path(os.environ["RECORD"])
given = {"environment": dict(os.environ), "words": sys.argv[1:]}
if "OMPI_COMM_WORLD_SIZE" in os.environ:  # what DeepSpeed asks MPI for
    from mpi4py import MPI

    job, host = MPI.COMM_WORLD, MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
    given["mpi"] = {"RANK": str(job.rank), "WORLD_SIZE": str(job.size), "LOCAL_RANK": str(host.rank)}
unfinished = place / f"{os.getpid()}.partial"
unfinished.write_text(json.dumps(given))
unfinished.rename(place / f"{os.getpid()}.json")
until = time.monotonic() + 3600
while not (place / "done").exists() and time.monotonic() < until:
    time.sleep(0.1)
