"""Runs benches in the test's process, and reads their rows."""

import json
import signal

import _rows
import pytest
from _common import Bench

from specdec_triton.tools import calibration

CEILINGS = {"copy_bytes_s": 1e10, "read_bytes_s": 2e10, "matmul_flops_s": 1e11, "launch_us": 1.0}


@pytest.fixture
def quick(monkeypatch):
    """No calibration, and a bench's handler of SIGTERM is removed after the test."""
    monkeypatch.setattr(calibration, "calibrate", lambda device: CEILINGS)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def bench(folder, *argv, name="accept"):
    return Bench(name, "", argv=["--rehearse", *(["--out", str(folder)] if folder else []), *argv])


def rows(folder, **wanted):
    found = json.loads((folder / _rows.ROWS).read_text())["rows"]
    return [row for row in found if all(row.get(name) == value for name, value in wanted.items())]
