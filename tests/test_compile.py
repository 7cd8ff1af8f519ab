"""Compiled kernels, without a GPU: no spills, tensor cores, wide loads, and the committed tables."""

import json
import re

import pytest

triton = pytest.importorskip("triton")

from specdec_triton.kernels import tree_attention  # noqa: E402
from specdec_triton.tools import compile_report, inspection  # noqa: E402

# few enough for one process; test_inspect.py holds 16, 32 and 128 rows of bf16 d128
QUICK = (
    r"tree_attention/(bf16 d128 m64 n\d+ split|fp16 d128 m32 n64 one|bf16 d64 m16 n64 one window sinks"
    r"|merge d128 p16)$|accept_greedy/.*bf16 argmax (1024|4096 odd V)$|compact_kv/(16|1)-byte"
    r"|append_tokens/n64$|build_tree/c1024 n64$|best_first_tree/n64$|tree_inputs/all trees$"
    r"|rotary_and_cache/bf16 d128( norms)? n64$"
    r"|rms_norm/bf16 c(4096 residual|8191 update)$|gated_activation/bf16 silu$"
    r"|ngram_lookup/(search|chain n16)$"
    # spilled under Triton 3.6
    r"|tree_attention/(bf16 d64 m16 n64 split chunk|fp32 d256 m16 n16 split window softcap)$|.*/walk typical n256$"
    r"|draft_topk/(bf16 tiles (none|draft log_probs rows)|merge coupled k4)$"
    r"|accept_sample/(bf16 (statistics coupled|rows multi_round without.*|draws block with)|walk coupled n64)$"
)


def test_quick():
    steps = []
    rows = compile_report.table(90, QUICK, progress=lambda: steps.append(None))
    # as many as announced, some of them before the first kernel is compiled
    assert len(steps) == inspection.num_steps(90, QUICK)
    assert not compile_report.findings(rows, 90, whole=False)
    assert {name.partition("/")[0] for name in rows} == set(inspection.OPS)
    for name, row in rows.items():
        if " m64 " in name or " m128 " in name:
            assert row["hgmma"], f"{name}: no warpgroup instruction"
        if name.startswith("tree_attention") and "merge" not in name:
            assert row["ldgsts128"], f"{name}: keys and values do not come by asynchronous 128-bit copies"


@pytest.mark.slow
@pytest.mark.parametrize("arch", inspection.ARCHES)
def test_whole_table(arch):
    assert not compile_report.findings(compile_report.table(arch), arch)


@pytest.mark.parametrize("arch", inspection.ARCHES)
def test_committed_tables(arch):
    """The tables list exactly the configurations of the code, without faults."""
    rows = compile_report.committed(arch)["rows"]
    assert not [fault for name, row in rows.items() for fault in inspection.faults(name, row)]
    assert rows.keys() == {name for name, _ in inspection.cases(arch)}, (
        "run python -m specdec_triton.tools.compile_report"
    )
    wide = [row for name, row in rows.items() if arch == 90 and (" m64 " in name or " m128 " in name)]
    assert all(row["hgmma"] for row in wide)


@pytest.mark.parametrize("arch", inspection.ARCHES)
def test_as_many_programs_fit_as_are_planned(arch):
    """Programs of tree attention on a multiprocessor. One may fit if two are planned: a wave is then two full ones."""
    seen = set()
    for name, row in compile_report.committed(arch)["rows"].items():
        found = re.fullmatch(r"tree_attention/(\w+) d(\d+) m(\d+) n\d+ split(.*)", name)
        if found:
            dim, rows = int(found[2]), int(found[3])
            limited, itemsize = found[4] != "", 4 if found[1] == "fp32" else 2
            # an entry may be for more rows than its tile has; take the one with this tile
            chosen = [
                tree_attention.attention_config(arch, count, dim, itemsize, False, limited) for count in (rows, 1024)
            ]
            planned = next(config.programs for config in chosen if config.block_m == rows)
            fit = min(inspection.occupancy(row, arch)[0], 2)
            assert fit == planned or (fit, planned) == (1, 2) and (arch, limited) != (90, False), name
            seen.add(planned)
    assert seen == {1, 2}


def test_faults_are_found():
    row = {"spill_bytes": 0, "local": 0, "hmma": 1, "hgmma": 0, "ldg128": 1, "ldgsts128": 0}
    row |= {"tensor_cores": True, "wide_loads": True}
    assert not inspection.faults("case", row)
    for wrong in ({"spill_bytes": 8}, {"local": 2}, {"hmma": 0}, {"ldg128": 0}):
        assert len(inspection.faults("case", row | wrong)) == 1
    assert compile_report.compare({"a": row}, {"a": row | {"hmma": 2}, "b": row}) == [
        "a: hmma 2 -> 1",
        "b: in the committed table, not compiled",
    ]
    assert compile_report.compare({"a": json.loads(json.dumps(row))}, {"a": row}) == []
