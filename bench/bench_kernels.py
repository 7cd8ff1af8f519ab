"""The ceilings, then the benches of the kernels, in one process: torch and the kernels are loaded once.

    python bench/bench_kernels.py --out FOLDER [--budget SECONDS] [--seconds SECONDS] [--rehearse]

Each bench gets its share of the time that is left. Exit status: 1 if an output was wrong or a bench failed; 3 if the
GPU is lost to this process, after which a new process goes on with the next case.
"""

import argparse
import importlib
import math
import pathlib
import sys
import time
import traceback

from _common import DEAD

SHARES = {"tree_attention": 95, "accept": 25, "accept_sample": 50, "compact": 25}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds for all of them")
    options, rest = parser.parse_known_args()
    until, shares = time.perf_counter() + options.budget, dict(SHARES)
    out = ["--out", str(options.out)]
    status = run("calibrate", out)
    for name, share in SHARES.items():
        left = max(0.0, until - time.perf_counter())
        budget = left * share / sum(shares.values())
        status |= run(f"bench_{name}", [*out, "--budget", str(budget), *rest])
        del shares[name]
    return status


def run(script: str, arguments: list[str]) -> int:
    """The exit status of a script's `main` with these arguments. If it raises, the next script runs all the same.

    Raises:
        SystemExit: `DEAD`.
    """
    sys.argv[1:] = arguments
    try:
        return importlib.import_module(script).main()
    except Exception:
        traceback.print_exc()
        return 1
    except SystemExit as stop:
        if stop.code == DEAD:
            raise
        return int(stop.code or 0)


if __name__ == "__main__":
    sys.exit(main())
