"""Drafters: they propose draft trees."""

from .base import DraftContext, Drafter, DraftSession, NoDrafter
from .dflash import DFlashDrafter
from .eagle import EagleDrafter
from .early_exit import EarlyExitDrafter
from .medusa import MedusaDrafter
from .model import ModelDrafter
from .mtp import MTPDrafter
from .oracle import OracleDrafter
from .prompt_lookup import PromptLookupDrafter
from .shared_kv import Gemma4AssistantDrafter
from .suffix import SuffixDrafter

__all__ = [
    "DFlashDrafter",
    "DraftContext",
    "DraftSession",
    "Drafter",
    "EagleDrafter",
    "EarlyExitDrafter",
    "Gemma4AssistantDrafter",
    "MTPDrafter",
    "MedusaDrafter",
    "ModelDrafter",
    "NoDrafter",
    "OracleDrafter",
    "PromptLookupDrafter",
    "SuffixDrafter",
]
