"""Speculative decoding for Hugging Face models, run as Triton kernels.

import specdec_triton as sdt

sdt.patch(model)
model.generate(**inputs, prompt_lookup_num_tokens=10)

The public names are those of `_api`. They are imported on first use, since transformers takes seconds to import and
`specdec_triton.ops` does not need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ._api import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        """Return a public name or a module of the package."""
        if not name.startswith("__"):
            try:
                return import_module(f"{__name__}.{name}")
            except ModuleNotFoundError as error:
                if error.name != f"{__name__}.{name}":
                    raise
        api = import_module(f"{__name__}._api")
        if name != "__all__" and name not in api.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # cached, since each later use would search the file system for a module of this name
        globals()[name] = value = getattr(api, name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
