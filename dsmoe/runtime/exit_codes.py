"""Exit codes of every command: what a launcher, a scheduler or a supervisor may decide by.

| code | meaning                                                              | the same command again             |
|------|----------------------------------------------------------------------|------------------------------------|
| 0    | finished, or stopped where `training.stop_at` says                   | has nothing left to do             |
| 1    | failed while at work: a full disk, a loss that is not finite, a crash | resumes from the newest checkpoint |
| 2    | refused before any work: a mistake in what was asked for             | is refused again                   |
| 75   | stopped by a signal before the end, with a checkpoint                | resumes there                      |
| 130  | ended at once by a second Ctrl-C, without a checkpoint               | resumes from the newest checkpoint |
"""

from __future__ import annotations

FINISHED = 0
FAILED = 1
REFUSED = 2
STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again
INTERRUPTED = 130
