"""Speculative decoding for Hugging Face models, run as Triton kernels.

import specdec_triton as sdt

sdt.patch(model)
model.generate(**inputs, prompt_lookup_num_tokens=10)
"""

from . import ops
from ._patch import SpeculativeGenerate, patch, patched, stats, unpatch
from ._stats import Stats
from .drafters import (
    DraftContext,
    Drafter,
    DraftSession,
    EarlyExitDrafter,
    ModelDrafter,
    OracleDrafter,
    PromptLookupDrafter,
)
from .forward.cache import TreeCache
from .options import Options
from .tree import DraftTree, DynamicTree, Topology
from .tree_choice.costs import Costs
from .tree_choice.search import expected_tokens, optimal_topology

__version__ = "0.1.0"

__all__ = [
    "Costs",
    "DraftContext",
    "DraftSession",
    "DraftTree",
    "Drafter",
    "DynamicTree",
    "EarlyExitDrafter",
    "ModelDrafter",
    "Options",
    "OracleDrafter",
    "PromptLookupDrafter",
    "SpeculativeGenerate",
    "Stats",
    "Topology",
    "TreeCache",
    "expected_tokens",
    "ops",
    "optimal_topology",
    "patch",
    "patched",
    "stats",
    "unpatch",
]
