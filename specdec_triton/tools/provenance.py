"""The origin of measured numbers: device, driver, versions, date and commit; and the checkout of the benchmarks."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import subprocess

import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]


def provenance(device: torch.device) -> dict[str, str]:
    """The fields of a row that give its origin."""
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
    """The version of an installed package, or `absent`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return absent


def commit() -> str:
    """The repository's commit; BENCH_COMMIT, if set, names it in place of git."""
    named = os.environ.get("BENCH_COMMIT")
    return named or output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")


def output(*command: str) -> str:
    """The output of a command; "unknown" if it fails or does not exist."""
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def results_folder(device: torch.device) -> pathlib.Path:
    """The folder under bench/results for rows of a device."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")
    return ROOT / "bench" / "results" / slug


def bench_folder() -> pathlib.Path:
    """The folder of benchmarks in the checkout that this package runs from.

    Raises:
        OSError: there is none, since the package was installed from a wheel. The message says how to get a checkout.
    """
    folder = ROOT / "bench"
    if not (folder / "report.py").is_file():
        source = source_url()
        place = f" ({source})" if source else " that this package was built from"
        raise OSError(
            f"bench: benchmarks must run in a checkout of the repository, got an installed package without them: there "
            f"is no {folder}. Get a checkout of the repository{place}, run pip install -e . in it, and repeat the "
            "command there"
        )
    return folder


def source_url(package: str = "specdec-triton") -> str | None:
    """The address of an installed package's repository, from its metadata or from pip's record of the installation;
    None if neither has it."""
    try:
        found = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return None
    links = dict(link.split(", ", 1) for link in found.metadata.get_all("Project-URL") or ())
    for label in ("Source", "Repository", "Homepage"):
        if label in links:
            return links[label]
    record = json.loads(found.read_text("direct_url.json") or "{}")
    # an archive is no repository
    return record.get("url") if "vcs_info" in record or "dir_info" in record else None
