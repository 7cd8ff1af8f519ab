"""Speculative decoding for Hugging Face models, run as Triton kernels.

import specdec_triton as sdt

sdt.patch(model)
model.generate(**inputs, prompt_lookup_num_tokens=10)
"""

from . import ops
from .adaptive import expected_tokens, optimal_topology
from .cache import TreeCache
from .costs import Costs
from .drafters import (
    DraftContext,
    Drafter,
    DraftSession,
    EarlyExitDrafter,
    ModelDrafter,
    OracleDrafter,
    PromptLookupDrafter,
)
from .options import Options
from .patch import SpeculativeGenerate, patch, patched, stats, unpatch
from .stats import Stats
from .tree import DraftTree, DynamicTree, Topology

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
