"""Checks the arguments of ops: shapes by letter, dtypes, devices, and types of plain values."""

import functools
import inspect
import typing
from collections.abc import Callable, Sequence

import torch

from .filters import Filters

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ANY_FLOAT = (torch.float64, *FLOAT_DTYPES)
DTYPE_NAMES = {FLOAT_DTYPES: "fp32, bf16 or fp16", ANY_FLOAT: "float"}
# field of `Filters` -> its dtype
FILTER_DTYPES = {
    "temperature": torch.float32,
    "top_k": torch.int64,
    "top_p": torch.float64,
    "min_p": torch.float32,
}


class Check:
    """Checks tensors one after the other. A tensor that does not fit raises a `ValueError` that names the owner and the
    argument.

    Args:
        owner: name of the op, class or function whose arguments are checked.
        like: the device of all tensors; None for the device of the first tensor.
        sizes: sizes that are known in advance, by letter.

    Attributes:
        sizes: letter -> size, from the first tensor with that letter.
    """

    def __init__(self, owner: str, like: torch.device | None = None, **sizes: int) -> None:
        self.owner, self.device, self.sizes = owner, like, sizes

    def __call__(self, name: str, tensor: torch.Tensor, shape: str, *dtypes: torch.dtype) -> torch.Size:
        """Check a tensor and return its shape.

        Args:
            name: name of the argument.
            tensor: its value.
            shape: a letter for each dimension, such as "B, N, V". A letter that is not known yet takes its size from
                this tensor. A size must not be 0 unless the letter ends with "?", such as "E?".
            dtypes: the permitted dtypes.

        Raises:
            ValueError: the type, shape, dtype or device of the tensor differs from the above.
        """
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{self.owner}: {name} must be a tensor, got {type(tensor).__name__}")
        letters, sizes, got = shape.split(", "), self.sizes, tensor.shape
        old = len(sizes)  # letters after these, in the order of insertion, are new
        fits = tensor.dtype in dtypes and len(got) == len(letters)
        for letter, size in zip(letters, got, strict=False):
            if sizes.setdefault(letter, size) != size or (not size and letter[-1] != "?"):
                fits = False
        if not fits:
            kind = DTYPE_NAMES[dtypes] if dtypes in DTYPE_NAMES else " or ".join(map(str, dtypes))
            known = [*sizes][:old]
            shown = [str(sizes[letter]) if letter in known else letter.removesuffix("?") for letter in letters]
            nonzero = ", none of them 0" if "?" not in shape and len({*letters} - {*known}) > 1 else ""
            raise self.refusal(name, f"{kind} [{', '.join(shown)}]{nonzero}", tensor)
        device = tensor.device
        if self.device is None:
            self.device = device
        elif device != self.device:
            raise self.refusal(name, f"on {self.device}", tensor)
        return got

    def refusal(self, name: str, wanted: str, got: torch.Tensor) -> ValueError:
        """The error for a tensor. It shows dtype, shape, device and strides, never values."""
        strides = "" if got.is_contiguous() else f" with strides {list(got.stride())}"
        return ValueError(
            f"{self.owner}: {name} must be {wanted}, got {got.dtype} {list(got.shape)} on {got.device}{strides}"
        )


def is_number(value: typing.Any, kinds: type | tuple[type, ...]) -> bool:
    """True if a value is a number of one of the `kinds` within the range of 64-bit integers, and not a bool."""
    if not isinstance(value, kinds) or isinstance(value, bool):
        return False
    return -(2.0**63) <= value < 2.0**63  # type: ignore[operator]


def check_filters(check: Check, name: str, filters: Filters) -> None:
    """Check the `Filters` of the B sequences that `check` knows.

    Raises:
        ValueError: it is not a `Filters`, or a shape, dtype, device or max_top_k is wrong.
    """
    if not isinstance(filters, Filters):
        raise ValueError(f"{check.owner}: {name} must be a Filters, got {type(filters).__name__}")
    for field, dtype in FILTER_DTYPES.items():
        option = getattr(filters, field)
        if option is not None:
            check(f"{name}.{field}", option, "B", dtype)
    if filters.max_top_k is not None and (
        filters.top_k is None or not is_number(filters.max_top_k, int) or filters.max_top_k < 1
    ):
        raise ValueError(
            f"{check.owner}: {name}.max_top_k must be None, or at least 1 with a top_k, got {filters.max_top_k!r}"
        )


# annotation -> (description of the type, function that tests a value)
KINDS = {
    torch.Tensor: ("a tensor", lambda value: isinstance(value, torch.Tensor)),
    int: ("an integer of 64 bits", lambda value: isinstance(value, torch.SymInt) or is_number(value, int)),
    float: ("a finite number", lambda value: is_number(value, (int, float))),
    str: ("a string", lambda value: isinstance(value, str)),
    Sequence[int]: (
        "a list of integers",
        lambda value: isinstance(value, (list, tuple)) and all(is_number(each, int) for each in value),
    ),
}


def typed(op: Callable) -> Callable:
    """Decorator: before the op runs, refuse arguments whose type differs from their annotation."""
    kinds = {}
    for name, annotation in typing.get_type_hints(op).items():
        plain, optional = (*typing.get_args(annotation), annotation)[0], type(None) in typing.get_args(annotation)
        if annotation in KINDS or plain in KINDS:
            wanted, fits = KINDS.get(annotation) or KINDS[plain]
            kinds[name] = (wanted + " or None" * optional, fits, optional)
    names = tuple(inspect.signature(op).parameters)

    @functools.wraps(op)
    def checked(*arguments, **options):
        for name, value in (*zip(names, arguments, strict=False), *options.items()):
            if name in kinds:
                wanted, fits, optional = kinds[name]
                if not fits(value) and not (optional and value is None):
                    got = repr(value) if isinstance(value, (int, float, str)) else type(value).__name__
                    raise ValueError(f"{op.__name__}: {name} must be {wanted}, got {got}")
        return op(*arguments, **options)

    return checked
