"""This machine's ceilings: bandwidth of reads and copies, matrix products, launches, graph replays, host reads.

    python bench/calibrate.py [--out FOLDER]

Writes `calibration.json`, of which the other benches quote fractions for an hour. Meant to run first.
"""

import argparse
import json
import pathlib
import sys

import torch
from _common import CALIBRATION, RESULTS, ceilings, provenance, slug


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder (default: bench/results/DEVICE)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = parser.parse_args().out or RESULTS / slug(provenance(device)["device"])
    (folder / CALIBRATION).unlink(missing_ok=True)
    found = ceilings(device, folder)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
