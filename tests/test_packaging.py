"""What is importable from where, and who imports whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "specdec_triton"

# module or folder -> the modules of ours that it may import. Arrows point down only; the kernels are reached
# by ops, which launches them, and by inspection, which compiles them.
ARROWS = {
    # each other's private helpers only
    "kernels": {f"kernels.{name}" for name in ("_chances", "_common", "_law", "_noise", "_walk")},
    "noise": set(),
    "filters": set(),
    "rules": {"noise"},
    "reference": {"filters", "rules"},
    "tree": {"filters", "reference", "rules"},
    "costs": set(),
    "adaptive": {"costs", "tree"},
    "ops": {"filters", "reference", "rules", "kernels"},
    "versions": set(),
    "wrappers": set(),
    "preparation": {"versions"},
    "checks": {"preparation"},
    "attention": {"ops", "reference"},
    "cache": {"ops"},
    "runner": {"attention", "cache", "preparation", "tree", "versions"},
    "drafters": {
        "cache",
        "checks",
        "drafters",
        "filters",
        "noise",
        "ops",
        "reference",
        "rules",
        "runner",
        "tree",
        "wrappers",
    },
    "penalties": {"reference", "tree"},
    "processors": {"filters", "penalties", "tree"},
    "transcript": {"reference", "tree"},
    "ended": {"drafters", "transcript", "tree"},
    "lockstep": {"drafters", "ended", "processors", "reference", "transcript", "tree"},
    "graphs": set(),
    "engine": {"graphs"},
    "stats": set(),
    "inputs": {"noise"},
    "options": {"costs", "drafters", "rules", "tree"},
    "auto": {"adaptive", "costs", "drafters", "engine", "rules", "tree"},
    "generate": {
        "adaptive",
        "auto",
        "checks",
        "drafters",
        "ended",
        "engine",
        "filters",
        "inputs",
        "lockstep",
        "noise",
        "ops",
        "options",
        "penalties",
        "processors",
        "reference",
        "rules",
        "runner",
        "stats",
        "transcript",
        "tree",
        "versions",
    },
    "patch": {
        "checks",
        "drafters",
        "engine",
        "generate",
        "options",
        "preparation",
        "stats",
        "tree",
        "versions",
        "wrappers",
    },
    "instruments": set(),
    "cards": set(),
    "plan": {"adaptive", "cards", "costs", "files", "runner"},
    "inspection": {"cards", "kernels"},
    "calibration": {"graphs"},
    "profiling": {"calibration", "engine", "generate", "instruments"},
    "trace": {"drafters", "reference", "tree"},
    "proof": set(),
    "files": set(),
    "models": {"files"},
    "prompts": set(),
    # these use the library as any user would: `import specdec_triton`
    "demo": {"specdec_triton", "instruments", "models", "prompts"},
    "prove": {"specdec_triton", "drafters", "proof"},
    "shrink": set(),
    "support": {"specdec_triton", "shrink"},
    "support_page": {"support"},
    "cli": {
        "specdec_triton",
        "cards",
        "calibration",
        "demo",
        "engine",
        "generate",
        "inspection",
        "instruments",
        "models",
        "ops",
        "patch",
        "plan",
        "profiling",
        "prompts",
        "prove",
        "rules",
        "support",
        "support_page",
    },
}
# third-party packages, where they are limited
PACKAGES = {
    "kernels": {"torch", "triton"},
    "noise": {"torch"},
    "filters": {"torch"},
    "rules": {"torch"},
    "reference": {"torch"},
    "tree": {"torch"},
    "costs": {"numpy"},
    "adaptive": {"numpy"},
    "ops": {"torch"},
    "instruments": {"torch"},
    "calibration": {"torch"},
    "graphs": {"torch"},
    "proof": {"numpy", "torch"},
    "prompts": set(),
    "shrink": {"transformers"},
}


def modules():
    """(module name, path, dotted package of the file) of each of our files but __init__.py."""
    for path in sorted(PACKAGE.glob("*.py")):
        if path.stem != "__init__":
            yield path.stem, path, "specdec_triton"
    for folder in ("drafters", "kernels"):
        for path in sorted((PACKAGE / folder).glob("*.py")):
            yield folder, path, f"specdec_triton.{folder}"


def imported_names(path, package):
    """Dotted names that a file imports, relative ones resolved; `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def ours_and_theirs(path, package):
    """The modules of ours and the third-party packages that a file imports."""
    ours, theirs = set(), set()
    for name in imported_names(path, package):
        first, *rest = name.split(".")
        if first != "specdec_triton":
            theirs |= {first} - sys.stdlib_module_names
        elif not rest or rest[0] not in ARROWS:
            ours.add("specdec_triton")
        else:
            ours.add(".".join(rest[:2]) if rest[0] == "kernels" else rest[0])
    return ours, theirs


@pytest.mark.parametrize(
    ("module", "path", "package"), [pytest.param(*found, id=str(found[1].relative_to(ROOT))) for found in modules()]
)
def test_imports_follow_the_arrows(module, path, package):
    assert module in ARROWS, f"{path.name} is new: say in ARROWS what it may import"
    ours, theirs = ours_and_theirs(path, package)
    allowed = ARROWS[module]
    forbidden = {name for name in ours if name not in allowed and name.split(".")[0] not in allowed}
    assert not forbidden, f"{path.name} must not import {sorted(forbidden)}"
    assert theirs <= PACKAGES.get(module, theirs), f"{path.name} must not import {sorted(theirs - PACKAGES[module])}"


def test_the_reader_of_imports_sees_every_form(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "import os, numpy as np\nimport specdec_triton as sdt\nfrom . import ops\nfrom .tree import DraftTree\n"
        "from specdec_triton import patch\nimport specdec_triton.kernels.accept_greedy\n"
        "def late():\n    from .generate import Stats\n    from transformers.cache_utils import Cache\n"
    )
    ours, theirs = ours_and_theirs(file, "specdec_triton")
    assert ours == {"specdec_triton", "ops", "tree", "patch", "kernels.accept_greedy", "generate"}
    assert theirs == {"numpy", "transformers"}
    file.write_text("from ..tree import DraftTree\nfrom .base import Drafter\nfrom .. import ops\n")
    assert ours_and_theirs(file, "specdec_triton.drafters")[0] == {"tree", "drafters", "ops"}


def test_kernels_is_a_folder_without_init_reached_by_a_symlink():
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()
    link = PACKAGE / "kernels"
    assert link.is_symlink() and link.readlink() == Path("../kernels")


def test_pyproject_maps_the_packages():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["tool"]["setuptools"]["package-dir"] == {"specdec_triton.kernels": "kernels"}
    listed = set(settings["tool"]["setuptools"]["packages"])
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert listed == {"specdec_triton", *(f"specdec_triton.{name}" for name in folders)}
    assert settings["project"]["scripts"] == {"specdec-triton": "specdec_triton.cli:main"}
    assert "triton" not in {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}


def test_the_newest_transformers_is_one_everywhere():
    namespace = (PACKAGE / "versions.py").read_text()
    newest = next(line.split('"')[1] for line in namespace.splitlines() if line.startswith("NEWEST"))
    assert f"NEWEST := transformers~={newest}.0\n" in (ROOT / "Makefile").read_text()


def python(code):
    """Run code from the root."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What a process in the root finds: of the name `kernels`, as our kernels' folder, and as that folder elsewhere.

    The last by a process that it forks, which has imported torch and transformers but nothing of ours."""
    return python(
        f"""
import importlib.util, os, sys, transformers, transformers.modeling_utils
spec = importlib.util.find_spec("kernels")
print("absent" if spec is None else spec.origin or "namespace", flush=True)
elsewhere = os.fork()
if not elsewhere:
    os.chdir({str(tmp_path_factory.mktemp("elsewhere"))!r})
    assert sys.path[0] == "" and "specdec_triton" not in sys.modules
    sys.path.insert(1, {str(ROOT)!r})  # as after an editable install
else:
    assert os.waitpid(elsewhere, 0)[1] == 0
import specdec_triton.kernels as kernels
print(list(kernels.__path__)[0])
"""
    ).splitlines()


def test_the_root_does_not_shadow_hugging_faces_kernels(found):
    # a namespace package gives way to a real package of that name anywhere on the path
    assert found[0] in ("absent", "namespace") or not Path(found[0]).is_relative_to(ROOT)


def test_a_real_kernels_package_wins_over_our_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("REAL = True")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.REAL)"
    assert python(code) == "True"


@pytest.mark.parametrize("place", [1, 2], ids=["root", "elsewhere"])
def test_kernels_import_from_the_root_and_from_elsewhere(found, place):
    assert len(found) == 3 and Path(found[place]).resolve() == ROOT / "kernels"
