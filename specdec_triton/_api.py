"""The public names of the package: each is available as `specdec_triton.<name>`."""

from . import ops
from ._patch import SpeculativeGenerate, patch, patched, release, stats, unpatch
from ._stats import Stats
from ._warmup import warmup
from .drafters import (
    DFlashDrafter,
    DraftContext,
    Drafter,
    DraftSession,
    EagleDrafter,
    EarlyExitDrafter,
    Gemma4AssistantDrafter,
    MedusaDrafter,
    ModelDrafter,
    MTPDrafter,
    NoDrafter,
    OracleDrafter,
    PromptLookupDrafter,
    SuffixDrafter,
)
from .forward.cache import TreeCache
from .ops.filters import Filters
from .ops.reference import Acceptance
from .options import Options
from .tree import DraftTree, DynamicTree, Topology
from .tree_choice.costs import Costs
from .tree_choice.search import expected_tokens, optimal_topology

__all__ = [
    "Acceptance",
    "Costs",
    "DraftContext",
    "DraftSession",
    "DraftTree",
    "Drafter",
    "DynamicTree",
    "DFlashDrafter",
    "EagleDrafter",
    "EarlyExitDrafter",
    "Gemma4AssistantDrafter",
    "Filters",
    "MTPDrafter",
    "MedusaDrafter",
    "ModelDrafter",
    "NoDrafter",
    "Options",
    "OracleDrafter",
    "PromptLookupDrafter",
    "SuffixDrafter",
    "SpeculativeGenerate",
    "Stats",
    "Topology",
    "TreeCache",
    "expected_tokens",
    "ops",
    "optimal_topology",
    "patch",
    "patched",
    "release",
    "stats",
    "unpatch",
    "warmup",
]
