"""A typed program that uses the package. `make lint` checks its types; it is never run.

A `type: ignore` here must be needed: mypy reports it if the call that it covers is accepted.
"""

import dataclasses
import json

import torch
from transformers import PreTrainedModel

import specdec_triton as sdt


def decode(model: PreTrainedModel, draft: PreTrainedModel, input_ids: torch.Tensor) -> str:
    drafter: sdt.Drafter = sdt.ModelDrafter(draft, tree=16)
    sdt.patch(model, drafter=drafter, rule="rejection", seed=[1, 2], cuda_graphs="auto", impl="triton")
    sdt.unpatch(model)
    with sdt.patched(model, drafter=drafter, tree=sdt.DynamicTree(16, 4, 5)) as same:
        same.generate(input_ids)
    costs = sdt.Costs(verify=((1, 1.0),), draft=((1, 0.1),))
    model.generate(input_ids, custom_generate=sdt.SpeculativeGenerate(drafter=drafter, tree="auto", costs=costs))
    stats: sdt.Stats = sdt.stats(model)
    rates: list[float] = [count / stats.row_rounds for count in stats.accepted_by_position]
    return json.dumps(dataclasses.asdict(stats)) + f"{stats.acceptance_length:.2f} {rates}"


def refused(model: PreTrainedModel) -> None:
    sdt.patch(model, drafters=None)  # type: ignore[call-arg]
    sdt.patch(model, tree="best")  # type: ignore[arg-type]
    sdt.SpeculativeGenerate(cuda_graphs="always")  # type: ignore[arg-type]
    sdt.patch(model, None)  # type: ignore[call-arg]
    sdt.patch_all(model)  # type: ignore[attr-defined]
