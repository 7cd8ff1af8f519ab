"""Where a number was measured: device, driver, versions, date and commit."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]


def provenance(device: torch.device) -> dict[str, str]:
    """The fields of a row that say where it was measured."""
    on_gpu = device.type == "cuda"
    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "none"
    return {
        "device": device_name(device),
        "driver": driver.partition("\n")[0],
        **{package: version(package) for package in ("torch", "triton", "transformers")},
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """The name of a GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def version(package: str, absent: str = "absent") -> str:
    """Of an installed package, or `absent`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return absent


def commit() -> str:
    """Of the repository; BENCH_COMMIT names it if git cannot."""
    named = os.environ.get("BENCH_COMMIT")
    return named or output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def output(*command: str) -> str:
    """The output of a command; "unknown" if it fails or is not there."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def results_folder(device: torch.device) -> pathlib.Path:
    """The folder under bench/results that a device's rows go to."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return ROOT / "bench" / "results" / slug
