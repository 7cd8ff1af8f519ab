"""Drafters: where draft trees come from."""

from .base import DraftContext, Drafter, DraftSession, NoDrafter
from .model import ModelDrafter
from .oracle import OracleDrafter
from .prompt_lookup import PromptLookupDrafter

__all__ = [
    "DraftContext",
    "DraftSession",
    "Drafter",
    "ModelDrafter",
    "NoDrafter",
    "OracleDrafter",
    "PromptLookupDrafter",
]
