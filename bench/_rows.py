"""Files of rows. Torch is not needed, since reports are made from rows alone."""

import json
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
COMPILED = " compiled"  # is appended to a bench's name for its run with --compiled
# values of the field "inputs" of rows
CONTROLLED = "synthetic, controlled acceptance"
REPLAYED = "synthetic weights, replayed acceptance"
# ways to run a forward that is captured in a CUDA graph, see `way_of`
WAYS = ("fused", "compiled", "fused and compiled", "eager in graph")
ROWS, CALIBRATION, REPORT = "rows.json", "calibration.json", "report.md"


def way_of(shapes: dict) -> str | None:
    """How our methods ran their forwards: one of `WAYS`, or None if they were not captured. Rows of layers that run as
    in transformers name neither "fuse" nor "compile"."""
    if not shapes.get("cuda_graphs"):
        return None
    fused, compiled = shapes.get("fuse"), shapes.get("compile")
    return WAYS[2] if fused and compiled else WAYS[0] if fused else WAYS[1] if compiled else WAYS[3]


class Results:
    """A folder's `rows.json`: {"steps": {bench: state}, "rows": [row, ...]}.

    Args:
        folder: created by the first `save`; None: nothing is saved.
    """

    def __init__(self, folder: pathlib.Path | None):
        self.file = None if folder is None else folder / ROWS
        found = json.loads(self.file.read_text()) if self.file and self.file.exists() else {}
        self.steps: dict[str, dict] = found.get("steps", {})
        self._rows: dict[tuple, dict] = {_key(row): row for row in found.get("rows", [])}

    @property
    def rows(self) -> list[dict]:
        return list(self._rows.values())

    def add(self, row: dict) -> None:
        """Add a row; it replaces a row of the same bench, provider, dtype, inputs and shapes."""
        self._rows.pop(_key(row), None)
        self._rows[_key(row)] = row

    def step(self, bench: str, commit: str, rehearsal: bool) -> dict:
        """The state of a bench's run. If the state is of another commit, a new one replaces it, and rows of other
        commits are dropped.

        Args:
            bench: its name, with `COMPILED` appended for its run with --compiled.
        """
        state = self.steps.get(bench)
        if state is None or state["commit"] != commit:
            of_it = bench.removesuffix(COMPILED)
            self._rows = {
                key: row for key, row in self._rows.items() if row["bench"] != of_it or row.get("commit") == commit
            }
            counts = {"done": [], "complete": False, "seconds": 0.0, "wrong": 0, "failed": 0}
            state = self.steps[bench] = {"commit": commit, "rehearsal": rehearsal, **counts}
        return state

    def save(self) -> None:
        if self.file is None:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        rows = ",\n".join(json.dumps(row) for row in self._rows.values())
        partial = self.file.with_suffix(".partial")
        partial.write_text(f'{{"steps": {json.dumps(self.steps)},\n"rows": [\n{rows}\n]}}\n')
        partial.replace(self.file)


def _key(row: dict) -> tuple:
    return (*(row[name] for name in ("bench", "provider", "dtype", "inputs")), json.dumps(row["shapes"]))
