"""The tested versions of transformers, and names that differ between them."""

import inspect
import warnings
from functools import cache

import transformers
from packaging.version import Version
from transformers import GenerationMixin

NEWEST = "5.24"  # newest tested version; the oldest supported one is in pyproject.toml

# 5.24 renamed the cache in the arguments of forwards and decoding methods and in their outputs
_parameters = inspect.signature(inspect.unwrap(GenerationMixin.prepare_inputs_for_generation)).parameters
CACHE = "cache" if "cache" in _parameters else "past_key_values"


@cache
def warn_if_untested() -> None:
    """Warn once if the installed transformers is newer than the newest tested version."""
    installed = Version(transformers.__version__)
    if installed.release[:2] > Version(NEWEST).release:
        warnings.warn(
            f"specdec_triton: tested with transformers up to {NEWEST}, got {installed}: if a text differs from that of "
            "plain generate, please report it",
            stacklevel=4,
        )
