"""The ops of fused decoder layers: RMSNorm with the residual, rotary embedding with the cache writes, and the gated
activation; N rows of one sequence, at the sizes of a Llama.

    python bench/bench_layers.py [--rehearse]

Providers: the Triton kernels; on a CPU, the references; eager, which is the code of transformers' Llama and of our
cache; Liger's kernels, if it is installed; with --compiled, eager under torch.compile. Liger does not write to a cache:
its rotary embedding, which works in place, is followed by eager's writes. Outputs of ours and of eager are verified to
the units in the last place that `ops` promises. Liger and the compiler round at other places: their largest error may
be twice the reference's, both measured from fp32.

The floor is one read of the inputs and one write of the outputs. Inputs of few rows fit into the caches, as they do in
a forward, where the kernel before has just written them.
"""

import sys
from collections.abc import Callable
from functools import partial

import torch
from _common import Bench, Provider, absent_unless_importable
from _models import SHAPES
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from specdec_triton import ops

DTYPE = torch.bfloat16
EPS = 1e-5
COUNTED = 64  # N of the rows whose launches are counted; others have as many
PEER_ERROR = 2.0  # largest error of a peer, in largest errors of the reference

Outputs = tuple[torch.Tensor, ...]


def random(*sizes: int, device: torch.device) -> torch.Tensor:
    return torch.randn(*sizes, device=device).to(DTYPE)


class Norm:
    """`rms_norm` of the sum of residual and update.

    Attributes:
        ulps: for each output, how far ours may be from the reference, in units in the last place.
        nbytes: of all inputs and outputs, once each.
    """

    ulps: tuple[int, ...] = (2, 0)

    def __init__(self, shape: dict, nodes: int, device: torch.device):
        self.size, self.device = (1, nodes, shape["hidden_size"]), device
        self.module = LlamaRMSNorm(shape["hidden_size"], EPS).to(device, DTYPE).requires_grad_(False)
        self.module.weight.copy_(1 + 0.1 * torch.randn_like(self.module.weight))
        self.nbytes = DTYPE.itemsize * (4 * nodes + 1) * shape["hidden_size"]

    def make_sets(self, count: int) -> list[dict]:
        return [
            {
                "hidden": random(*self.size, device=self.device),
                "residual": random(*self.size, device=self.device),
                "weight": self.module.weight.detach(),
            }
            for _ in range(count)
        ]

    def ours(self, inputs: dict, impl: str) -> Outputs:
        return ops.rms_norm(**inputs, eps=EPS, impl=impl)

    def eager(self, inputs: dict) -> Outputs:
        summed = inputs["residual"] + inputs["hidden"]
        return self.module(summed), summed

    def liger(self, inputs: dict) -> Outputs:
        from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

        return LigerFusedAddRMSNormFunction.apply(
            inputs["hidden"], inputs["residual"], inputs["weight"], EPS, 0.0, "llama", False
        )


class FirstNorm(Norm):
    """`rms_norm` without a residual: the first norm of a forward."""

    ulps = (2,)

    def __init__(self, shape: dict, nodes: int, device: torch.device):
        super().__init__(shape, nodes, device)
        self.nbytes = DTYPE.itemsize * (2 * nodes + 1) * shape["hidden_size"]

    def make_sets(self, count: int) -> list[dict]:
        return [{name: inputs[name] for name in ("hidden", "weight")} for inputs in super().make_sets(count)]

    def ours(self, inputs: dict, impl: str) -> Outputs:
        return super().ours(inputs, impl)[:1]

    def eager(self, inputs: dict) -> Outputs:
        return (self.module(inputs["hidden"]),)

    def liger(self, inputs: dict) -> Outputs:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return (LigerRMSNormFunction.apply(inputs["hidden"], inputs["weight"], EPS, 0.0, "llama", False),)


class Rotary:
    """`rotary_and_cache`. The sets share a cache and write to different slots. See `Norm` for the attributes."""

    ulps = (0, 0, 0)

    def __init__(self, shape: dict, nodes: int, device: torch.device):
        self.nodes, self.device = nodes, device
        self.rows = torch.zeros(1, 1, dtype=torch.int64, device=device)  # indices of the sequences
        self.heads, self.kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
        self.head_dim = shape["hidden_size"] // self.heads
        moved = 2 * (self.heads + 2 * self.kv_heads) + 2  # query, key and value are read and written; cos, sin
        self.nbytes = nodes * (DTYPE.itemsize * moved * self.head_dim + torch.int64.itemsize)

    def make_sets(self, count: int) -> list[dict]:
        keys, values = (
            random(1, count * self.nodes, self.kv_heads, self.head_dim, device=self.device).transpose(1, 2)
            for _ in range(2)
        )
        return [
            self.make_projections()
            | {"keys": keys, "values": values}
            | {"slots": torch.arange(self.nodes, device=self.device)[None] + self.nodes * place}
            for place in range(count)
        ]

    def make_projections(self) -> dict:
        query, key, value = (
            random(1, self.nodes, heads, self.head_dim, device=self.device)
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        angles = (6.3 * torch.rand(1, self.nodes, self.head_dim // 2, device=self.device)).repeat(1, 1, 2)
        return {
            "query": query,
            "key": key,
            "value": value,
            "cos": angles.cos().to(DTYPE),
            "sin": angles.sin().to(DTYPE),
        }

    def ours(self, inputs: dict, impl: str) -> Outputs:
        return ops.rotary_and_cache(**inputs, impl=impl), inputs["keys"], inputs["values"]

    def eager(self, inputs: dict) -> Outputs:
        query, key = (inputs[name].transpose(1, 2) for name in ("query", "key"))
        return self.write(inputs, *apply_rotary_pos_emb(query, key, inputs["cos"], inputs["sin"]))

    def liger(self, inputs: dict) -> Outputs:
        from liger_kernel.ops.rope import LigerRopeFunction

        query, key = (inputs[name].transpose(1, 2) for name in ("query", "key"))
        return self.write(inputs, *LigerRopeFunction.apply(query, key, inputs["cos"], inputs["sin"]))

    def write(self, inputs: dict, query: torch.Tensor, key: torch.Tensor) -> Outputs:
        """Write a rotated key [B, Hkv, N, D] and the value to the cache, as `TreeCache.update` does."""
        keys, values, slots = (inputs[name] for name in ("keys", "values", "slots"))
        keys[self.rows, :, slots] = key.transpose(1, 2)
        values[self.rows, :, slots] = inputs["value"]
        return query.transpose(1, 2), keys, values


class Gated:
    """`gated_activation` with "silu". See `Norm` for the attributes."""

    ulps = (2,)

    def __init__(self, shape: dict, nodes: int, device: torch.device):
        self.size, self.device = (1, nodes, shape["intermediate_size"]), device
        self.act_fn = ACT2FN["silu"]
        self.nbytes = DTYPE.itemsize * 3 * nodes * shape["intermediate_size"]

    def make_sets(self, count: int) -> list[dict]:
        return [{name: random(*self.size, device=self.device) for name in ("gate", "up")} for _ in range(count)]

    def ours(self, inputs: dict, impl: str) -> Outputs:
        return (ops.gated_activation(**inputs, impl=impl),)

    def eager(self, inputs: dict) -> Outputs:
        return (self.act_fn(inputs["gate"]) * inputs["up"],)

    def liger(self, inputs: dict) -> Outputs:
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction

        return (LigerSiLUMulFunction.apply(inputs["gate"], inputs["up"]),)


KINDS = {
    "rms_norm": Norm,
    "rotary_and_cache": Rotary,
    "gated_activation": Gated,
    "rms_norm, no residual": FirstNorm,
}
Op = Norm | Rotary | Gated
# kind, model, N: the target's verify forward and plain step, then the draft's
LAYER = tuple(KINDS)[:3]
CASES = [(kind, model, nodes) for nodes in (64, 1, 8, 128) for model in ("llama 8B", "llama 1B") for kind in LAYER]
CASES += [("rms_norm, no residual", "llama 8B", nodes) for nodes in (64, 1)]
SMALL = [(kind, "tiny", nodes) for nodes in (1, 8) for kind in KINDS]
REHEARSED = [(kind, "tiny", 3) for kind in KINDS]
COMPILED = [
    (kind, model, nodes) for model, nodes in (("llama 8B", 64), ("llama 8B", 1), ("llama 1B", 1)) for kind in LAYER
]


def copied(inputs: dict, dtype: torch.dtype | None = None) -> dict:
    """Copies of all tensors, the floating-point ones in `dtype` if it is given."""
    return {
        name: tensor.to(dtype, copy=True) if dtype and tensor.is_floating_point() else tensor.clone()
        for name, tensor in inputs.items()
    }


def ulps_apart(got: torch.Tensor, wanted: torch.Tensor) -> int:
    """The largest distance of two bf16 tensors, in units in the last place."""

    def ordered(tensor: torch.Tensor) -> torch.Tensor:
        bits = tensor.contiguous().view(torch.int16).int()
        return torch.where(bits < 0, -32768 - bits, bits)  # so that -0 is 0

    return int((ordered(got) - ordered(wanted)).abs().max())


def check_near(op: Op, sets: list[dict], call: Callable) -> None:
    """Check outputs of ours or of eager: the difference from the reference is at most `op.ulps`."""
    for inputs in sets[:2]:
        wanted, got = op.ours(copied(inputs), "reference"), call(copied(inputs))
        for place, (mine, theirs, most) in enumerate(zip(got, wanted, op.ulps, strict=True)):
            apart = ulps_apart(mine, theirs)
            assert apart <= most, f"output {place} is {apart} units in the last place from the reference's"


def check_error(op: Op, sets: list[dict], call: Callable) -> None:
    """Check outputs of a peer: the error is at most `PEER_ERROR` times that of the reference."""
    for inputs in sets[:2]:
        exact = op.ours(copied(inputs, torch.float32), "reference")
        errors = (
            [(mine.float() - true).abs().max().item() for mine, true in zip(found, exact, strict=True)]
            for found in (call(copied(inputs)), op.ours(copied(inputs), "reference"))
        )
        for place, (error, reference) in enumerate(zip(*errors, strict=True)):
            # not >, so that NaN is an error too
            assert error <= PEER_ERROR * reference, f"output {place} has an error of {error}, the reference {reference}"


def liger(device: torch.device) -> str | None:
    """Why Liger cannot run, or None."""
    absent = absent_unless_importable("liger-kernel")
    return absent or (None if device.type == "cuda" else "needs a GPU")


@torch.no_grad()
def measure(bench: Bench, case: tuple[str, str, int]) -> None:
    kind, model, nodes = case
    op = KINDS[kind](SHAPES[model], nodes, bench.device)
    sets = op.make_sets(bench.num_sets(op.nbytes))
    on_gpu, compiled = bench.device.type == "cuda", None
    if bench.compiled and on_gpu:
        torch._dynamo.reset()  # else the eighth size is the last that is compiled
        compiled = torch.compile(op.eager, dynamic=False)
    checks = {Provider("triton", partial(op.ours, impl="triton"), kernel=True): check_near}
    if not on_gpu:  # on a GPU it would be eager again
        checks |= {Provider("reference", partial(op.ours, impl="reference")): check_near}
    shapes = {"op": kind, "model": model, "N": nodes}
    not_compiled = None if on_gpu else "compiled on a GPU only"
    checks |= {
        Provider("eager", op.eager): check_near,
        Provider("liger", op.liger, absent=liger(bench.device)): check_error,
        Provider("torch.compile of eager", compiled, absent=not_compiled, compiles=True): check_error,
    }
    for provider, check in checks.items():
        verify = partial(check, op, sets)
        bench.measure(provider, shapes, "bf16", sets, verify, nbytes=op.nbytes, count=nodes == COUNTED)


def main() -> int:
    bench = Bench("layers", __doc__)
    torch.manual_seed(0)
    if bench.compiled:
        return bench.run(measure, COMPILED, SMALL[:1], REHEARSED[:1])
    return bench.run(measure, CASES, SMALL, REHEARSED)


if __name__ == "__main__":
    sys.exit(main())
