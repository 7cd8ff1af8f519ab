"""The imports: public names, layers, and modules without their optional dependencies."""

import ast
import re
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

# Part of the package -> the parts that it may import, from the bottom up. Kernels are imported by the ops, which launch
# them, and by the tools, which compile them. A part is a folder, or a module of the top level.
ARROWS = {
    "kernels": set(),
    "ops": {"kernels"},
    "tree": {"ops"},
    "tree_choice": {"tree"},
    "forward": {"ops", "tree"},
    "processors": {"ops", "tree"},
    "heads": {"forward", "ops"},
    "drafters": {"forward", "heads", "ops", "tree", "tree_choice"},
    "options": {"drafters", "ops", "tree", "tree_choice"},
    "_stats": set(),
    "engine": {"_stats", "drafters", "forward", "ops", "options", "processors", "tree", "tree_choice"},
    "_patch": {"_stats", "drafters", "engine", "forward", "options", "tree_choice"},
    "_warmup": {"_patch", "_stats", "engine", "forward"},
    "_api": {"_patch", "_stats", "_warmup", "drafters", "forward", "ops", "options", "tree", "tree_choice"},
    "specdec_triton": {"_api"},
    # these use the library like any user: `import specdec_triton`
    "tools": {"drafters", "engine", "forward", "kernels", "ops", "specdec_triton", "tree", "tree_choice"},
}
# module or folder -> the third-party packages that it may import, if they are limited
PACKAGES = {
    "kernels": {"torch", "triton"},
    "ops": {"torch"},
    "tree": {"torch"},
    "tree_choice": {"numpy"},
    "engine.graphs": {"torch"},
    "tools.host_sync": {"torch"},
    "tools.calibration": {"torch"},
    "tools.goodness_of_fit": {"numpy", "torch"},
    "tools.prompts": set(),
    "tools.provenance": {"torch"},
    "tools.roofline": set(),
    "tools.shrink": {"transformers"},
}
# imported by the name of the op, not by an import statement
LATE = {("ops", "kernels"), ("tools", "kernels")}


def modules():
    """{dotted name below specdec_triton: path} of all files of the package. The `__init__` of a package has the
    package's name."""
    found = {}
    folders = [PACKAGE, *(path for path in sorted(PACKAGE.iterdir()) if path.is_dir() and path.name != "__pycache__")]
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            names = [folder.name] * (folder != PACKAGE) + [path.stem] * (path.stem != "__init__")
            found[".".join(names) or "specdec_triton"] = path
    return found


def part(module):
    return module.split(".")[0]


def imported_names(path, package):
    """Dotted names that a file imports, with relative ones resolved. `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def ours_and_theirs(path, package, known):
    """The modules of this package (as named by `modules`) and the third-party packages that a file imports."""
    ours, theirs = set(), set()
    for name in imported_names(path, package):
        first, *rest = name.split(".")
        if first != "specdec_triton":
            theirs |= {first} - sys.stdlib_module_names
            continue
        while rest and ".".join(rest) not in known:
            rest.pop()
        ours.add(".".join(rest) or "specdec_triton")
    return ours, theirs


def package_of(module, path):
    inside = module if path.stem == "__init__" else module.rpartition(".")[0]
    return "specdec_triton" if inside in ("", "specdec_triton") else f"specdec_triton.{inside}"


@pytest.fixture(scope="module")
def imports():
    """{module: (modules of this package, third-party packages)}."""
    known = modules()
    return {module: ours_and_theirs(path, package_of(module, path), known) for module, path in known.items()}


@pytest.mark.parametrize("module", modules())
def test_imports_follow_the_arrows(module, imports):
    ours, theirs = imports[module]
    assert part(module) in ARROWS, f"{module} is new: say in ARROWS what it may import"
    forbidden = {name for name in ours if part(name) not in ARROWS[part(module)] | {part(module)}}
    assert not forbidden, f"{module} must not import {sorted(forbidden)}"
    allowed = PACKAGES.get(module, PACKAGES.get(part(module), theirs))
    assert theirs <= allowed, f"{module} must not import {sorted(theirs - allowed)}"


def test_no_arrow_is_allowed_that_nothing_needs(imports):
    drawn = {(part(module), part(name)) for module, (ours, _) in imports.items() for name in ours} | LATE
    allowed = {(module, name) for module, names in ARROWS.items() for name in names}
    assert allowed == {(module, name) for module, name in drawn if module != name}


def test_imports_form_no_cycle(imports):
    """Imports inside functions count, too. Importing a module of a package also imports its `__init__`, which counts as
    a module above them."""
    left = {module: {name for name in ours if name != module} for module, (ours, _) in imports.items()}
    while left:
        free = {module for module, names in left.items() if not names & left.keys()}
        assert free, f"these import each other: {sorted(left)}"
        left = {module: names for module, names in left.items() if module not in free}


def test_the_reader_of_imports_sees_every_form(tmp_path):
    file = tmp_path / "file.py"
    file.write_text(
        "import os, numpy as np\nimport specdec_triton as sdt\nfrom . import ops\nfrom .tree import DraftTree\n"
        "from specdec_triton import patch\nimport specdec_triton.kernels.accept_greedy\n"
        "def late():\n    from .engine.generate import Stats\n    from transformers.cache_utils import Cache\n"
    )
    ours, theirs = ours_and_theirs(file, "specdec_triton", modules())
    assert ours == {"specdec_triton", "ops", "tree", "kernels.accept_greedy", "engine.generate"}
    assert theirs == {"numpy", "transformers"}
    file.write_text("from ..tree import DraftTree\nfrom .base import Drafter\nfrom .. import ops\n")
    assert ours_and_theirs(file, "specdec_triton.drafters", modules())[0] == {"tree", "drafters.base", "ops"}


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
    assert settings["project"]["scripts"] == {"specdec-triton": "specdec_triton.tools.cli:main"}
    assert "triton" not in {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}


def test_the_newest_transformers_is_one_everywhere():
    namespace = (PACKAGE / "forward" / "versions.py").read_text()
    newest = next(line.split('"')[1] for line in namespace.splitlines() if line.startswith("NEWEST"))
    assert f"NEWEST := transformers~={newest}.0\n" in (ROOT / "Makefile").read_text()


def python(code):
    """Run code in a new Python process in the root of the repository."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Three lines printed by a process that starts in the root: the origin of the module `kernels`, and the path of
    `specdec_triton.kernels` in that process and in another folder.

    The last line comes from a forked process that has imported torch and transformers but not this package.
    """
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
    # a regular package of that name anywhere on the path takes precedence over a namespace package
    assert found[0] in ("absent", "namespace") or not Path(found[0]).is_relative_to(ROOT)


def test_a_real_kernels_package_wins_over_our_folder(tmp_path):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("REAL = True")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.REAL)"
    assert python(code) == "True"


@pytest.mark.parametrize("place", [1, 2], ids=["root", "elsewhere"])
def test_kernels_import_from_the_root_and_from_elsewhere(found, place):
    assert len(found) == 3 and Path(found[place]).resolve() == ROOT / "kernels"


def test_imports_happen_on_first_use():
    """Importing the package imports neither torch nor transformers, and its ops do not import transformers. All public
    names can be imported."""
    code = """
import sys
import specdec_triton as sdt
assert "torch" not in sys.modules
sdt.ops.accept_greedy
assert "transformers" not in sys.modules
try:
    sdt.patches
except AttributeError as error:
    print(error)
from specdec_triton import *
print(sorted(set(sdt.__all__) - set(globals())), set(sdt.__all__) <= set(dir(sdt)), ops is sdt.ops)
"""
    assert python(code).splitlines() == ["module 'specdec_triton' has no attribute 'patches'", "[] True True"]


def test_each_module_has_tests():
    """Each module `<name>.py` has `tests/test_<name>.py` or a row in the table in CONTRIBUTING."""
    table = [
        line
        for line in (ROOT / "CONTRIBUTING.md").read_text().splitlines()
        if line.startswith("| `") and "test_" in line
    ]
    listed = " ".join(line.split("|")[1] for line in table)
    for module, path in modules().items():
        name = path.relative_to(PACKAGE).as_posix()
        if module.startswith("kernels."):
            file = f"test_kernel_{path.stem}.py"
        else:
            file = f"test_{path.stem.lstrip('_')}.py"
        places = (name, path.name, name.removesuffix(path.name), f"{name.removesuffix(path.name)}_*.py")
        is_listed = any(f"`{place}`" in listed for place in places[: 4 if path.stem.startswith("_") else 3])
        is_empty = path.stem == "__init__"
        assert is_listed or is_empty or (ROOT / "tests" / file).exists(), f"{name}: CONTRIBUTING must name its tests"
    for name in re.findall(r"`(test_\w+\.py)`", " ".join(table)):
        assert (ROOT / "tests" / name).exists(), f"CONTRIBUTING names {name}, which is not there"


def test_no_test_module_imports_another():
    for path in sorted((ROOT / "tests").glob("*.py")):
        others = [name for name in imported_names(path, "tests") if name.startswith("test_")]
        assert not others or path.stem == "test_first_gpu", f"{path.name} imports {others}: put helpers into helpers.py"
