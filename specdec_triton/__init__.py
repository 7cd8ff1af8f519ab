"""Speculative decoding for Hugging Face models, run as Triton kernels.

import specdec_triton as sdt

sdt.patch(model)
model.generate(**inputs, prompt_lookup_num_tokens=10)
"""

from . import ops
from .cache import TreeCache
from .drafters import (
    DraftContext,
    Drafter,
    DraftSession,
    EarlyExitDrafter,
    ModelDrafter,
    OracleDrafter,
    PromptLookupDrafter,
)
from .generate import Stats
from .options import Options
from .patch import SpeculativeGenerate, patch, patched, stats, unpatch
from .tree import DraftTree, DynamicTree, Topology

__version__ = "0.1.0"

__all__ = [
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
    "ops",
    "patch",
    "patched",
    "stats",
    "unpatch",
]
