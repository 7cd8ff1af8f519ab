"""This machine's ceilings: bandwidth of reads and copies, matrix products, launches, graph replays, host reads.

    python bench/calibrate.py [--out FOLDER]
    python bench/calibrate.py --where  # the folder under bench/results that this machine's rows go to

Writes `calibration.json`, of which the other benches quote fractions for an hour. Meant to run first.
"""

import argparse
import json
import pathlib
import sys

import torch
from _common import ceilings, provenance
from _rows import CALIBRATION, RESULTS, slug


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, help="folder (default: bench/results/DEVICE)")
    parser.add_argument("--where", action="store_true", help="print that folder, measure nothing")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder = options.out or RESULTS / slug(provenance(device)["device"])
    if options.where:
        print(folder)
        return 0
    (folder / CALIBRATION).unlink(missing_ok=True)
    found = ceilings(device, folder)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
