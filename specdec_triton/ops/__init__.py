"""The ops. Each op checks its arguments and is computed by a Triton kernel or by its PyTorch reference.

The ops of a round are in `trees` and `acceptance`, those of fused decoder layers in `layers`.

`impl=None` uses the Triton kernel if the tensors are on a CUDA GPU, and the reference otherwise. `tree_attention`,
`build_tree` and `best_first_tree` also use the reference for sizes that are too large for their kernels. An explicit
`impl="triton"` or `impl="reference"` is obeyed or refused, never replaced. Kernels are imported on first use. They are
called as registered ops (`torch.ops.specdec_triton`), so that torch.compile sees one opaque op with known outputs.

Strides: tensors may have any strides unless an op's docstring says otherwise. The docstring names the tensors that are
read in place; other tensors are copied if they are not contiguous.
"""

from .acceptance import accept_greedy, accept_sample, append_tokens, compact_kv
from .arguments import FILTER_DTYPES, FLOAT_DTYPES
from .layers import gated_activation, rms_norm, rotary_and_cache
from .reference import Acceptance, Candidates, TreeInputs
from .registry import HAS_TRITON, OPS, implementation, resolve
from .trees import (
    MAX_BUILT_NODES,
    MAX_CANDIDATES,
    MAX_HEAD_DIMS,
    best_first_tree,
    build_tree,
    draft_topk,
    ngram_lookup,
    tree_attention,
    tree_inputs,
)

__all__ = [
    "FILTER_DTYPES",
    "FLOAT_DTYPES",
    "HAS_TRITON",
    "MAX_BUILT_NODES",
    "MAX_CANDIDATES",
    "MAX_HEAD_DIMS",
    "OPS",
    "Acceptance",
    "Candidates",
    "TreeInputs",
    "accept_greedy",
    "accept_sample",
    "append_tokens",
    "best_first_tree",
    "build_tree",
    "compact_kv",
    "draft_topk",
    "gated_activation",
    "implementation",
    "ngram_lookup",
    "resolve",
    "rms_norm",
    "rotary_and_cache",
    "tree_attention",
    "tree_inputs",
]
