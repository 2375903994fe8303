"""Write text with a run.

dsmoe generate runs/quickstart --prompt "def main(" --tokens 200
"""

from __future__ import annotations

import argparse
import sys
from os.path import expanduser

from dsmoe.errors import CheckpointError
from dsmoe.runtime.command_line import quiet_libraries, require_path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=expanduser, help="a run folder, or one of its checkpoints")
    parser.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    parser.add_argument("--tokens", type=int, default=128, help="how many to write at most (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95, help="mass to sample from (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    arguments = parser.parse_args(argv)
    quiet_libraries()
    from dsmoe.inference.sampling import Sampling

    sampling = Sampling(arguments.tokens, arguments.temperature, arguments.top_p, arguments.seed)
    sampling.check()
    require_path(arguments.run, "a run folder or one of its checkpoints", CheckpointError)
    from dsmoe.inference.generate import Generator

    generator = Generator.load(arguments.run)
    sys.stdout.write(arguments.prompt)
    for text in generator.stream(arguments.prompt, sampling):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")
    return 0
