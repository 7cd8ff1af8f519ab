"""The keyword options of `patch`, `patched` and `SpeculativeGenerate`."""

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from functools import wraps
from typing import Literal, ParamSpec, TypeVar

import torch

from .drafters import Drafter
from .drafters.base import check_tree
from .ops import implementation
from .ops.rules import RULES
from .tree import DynamicTree, Topology
from .tree_choice.costs import Costs

Tree = Topology | DynamicTree | int | Literal["auto"] | None
Seed = int | Sequence[int] | None
P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Options:
    """Options shared by `patch`, `patched` and `SpeculativeGenerate`; validated on construction.

    Args:
        owner: name of the function or class that error messages begin with.

    Attributes:
        drafter: drafts for every `generate` call. None: each call's own assistance arguments choose the drafter.
        rule: acceptance rule of calls that sample: "coupled" (also used for None), "rejection", "block", "multi_round",
            "traversal", or "typical", which is lossy. Calls that do not sample always use greedy acceptance. With
            "greedy", calls that sample are refused.
        tree: shape of the draft: a `Topology`, a number of nodes (root included), a `DynamicTree`, None for the
            drafter's own shape, or "auto". "auto" chooses a tree for every round by measured times and acceptance; it
            decodes without a draft if no tree is faster.
        costs: seconds that a round takes, for tree="auto". None: they are measured, see `engine.auto_tree`.
        seed: makes sampled texts repeatable. A number: each row gets a seed derived from it. A list: one seed for each
            row, after expansion by num_return_sequences. None: each call draws a seed from torch's global generator.
            Calls without speculation ignore it; `SpeculativeGenerate()` gives the seeded text without a draft. With
            tree="auto" and measured costs, the trees depend on timing. The text depends on the trees under every
            sampling rule except "coupled", so pass `costs` to make it repeatable under the other rules.
        cuda_graphs: "auto" captures rounds as CUDA graphs if the model and the drafter allow it; `Stats.why_eager`
            gives the reason if they do not. True raises an error if rounds cannot be captured. False never captures.
        compile: run the tree forwards of the target and the draft model through `torch.compile`, which gives fewer and
            larger kernels.
        fuse: run decoder layers in fewer kernels: RMSNorm with the residual, rotary embedding with the cache writes,
            and the gated activation. "auto" does so on a GPU unless `compile` is True. It applies to the target and the
            draft model, in tree forwards only, and to modules whose source is known; the others run as they are.
            `Stats.fused` and `Stats.not_fused` name both. False never does.
        impl: implementation of the ops: "triton", "reference", or None for the better one on the model's device.

    Raises:
        ValueError: an option has none of these values.
    """

    drafter: Drafter | None = None
    rule: str | None = None
    tree: Tree = None
    costs: Costs | None = None
    seed: Seed = None
    cuda_graphs: Literal["auto"] | bool = "auto"
    compile: bool = False
    fuse: Literal["auto"] | bool = "auto"
    impl: Literal["triton", "reference"] | None = None
    owner: InitVar[str] = "Options"

    def __post_init__(self, owner: str) -> None:
        if self.drafter is not None and not isinstance(self.drafter, Drafter):
            name = type(self.drafter).__name__
            hint = ": wrap it, sdt.ModelDrafter(model)" if isinstance(self.drafter, torch.nn.Module) else ""
            raise ValueError(f"{owner}: drafter must be a Drafter or None, got {name}{hint}")
        if self.rule not in (None, "greedy", *RULES):
            raise ValueError(f"{owner}: rule must be None, greedy or one of {', '.join(RULES)}, got {self.rule!r}")
        if isinstance(self.tree, str) and self.tree != "auto":
            raise ValueError(
                f'{owner}: tree must be "auto", a Topology, a DynamicTree, a number of nodes or None, got {self.tree!r}'
            )
        if self.tree != "auto":
            check_tree(owner, self.tree)
        if self.costs is not None and not isinstance(self.costs, Costs):
            raise ValueError(f"{owner}: costs must be a Costs or None, got {type(self.costs).__name__}")
        if self.costs is not None and self.tree != "auto":
            raise ValueError(f'{owner}: costs must be None unless tree="auto", got them with tree={self.tree!r}')
        seeds = self.seed if isinstance(self.seed, (list, tuple)) else [] if self.seed is None else [self.seed]
        if any(isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63 for seed in seeds):
            raise ValueError(f"{owner}: seed must be None, a 64-bit integer or a list of them, got {self.seed!r}")
        if not (isinstance(self.cuda_graphs, bool) or self.cuda_graphs == "auto"):
            raise ValueError(f'{owner}: cuda_graphs must be "auto", True or False, got {self.cuda_graphs!r}')
        if not isinstance(self.compile, bool):
            raise ValueError(f"{owner}: compile must be True or False, got {self.compile!r}")
        if not (isinstance(self.fuse, bool) or self.fuse == "auto"):
            raise ValueError(f'{owner}: fuse must be "auto", True or False, got {self.fuse!r}')
        if self.impl not in (None, "triton", "reference"):
            raise ValueError(f'{owner}: impl must be None, "triton" or "reference", got {self.impl!r}')

    def fuses(self, device: torch.device) -> bool:
        """True if decoder layers run in fewer kernels on this device."""
        if self.fuse != "auto":
            return bool(self.fuse)
        return not self.compile and (self.impl or implementation("rms_norm", device)[0]) == "triton"


def with_known_options(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: an unknown keyword raises a `TypeError` that names the most similar option."""
    parameters, owner = inspect.signature(function).parameters, function.__qualname__.removesuffix(".__init__")
    known = [name for name, each in parameters.items() if each.kind is each.KEYWORD_ONLY]

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs.keys() - parameters.keys():
            nearest = difflib.get_close_matches(name, known, 1, 0.4)
            hint = f", did you mean {nearest[0]}?" if nearest else ""
            raise TypeError(f"{owner}: options must be among {', '.join(known)}, got {name}{hint}")
        return function(*args, **kwargs)

    return checked
