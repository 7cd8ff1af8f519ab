"""The roofline: bytes and FLOPs of a forward, of an op and of a round, a device's ceilings, and the time between them.

    datasheet("h100", "bf16").seconds(forward_work(shape_of(model), batch=1, rows=64, context=2048))

All numbers are floors: weights, keys and values are read once, logits are written once, activations are left out.
"""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

KERNEL_SECONDS = 1e-6  # from one kernel of a CUDA graph to the next, if it was not measured
RESULTS = pathlib.Path(__file__).resolve().parents[2] / "bench" / "results"


class GPU(NamedTuple):
    """A GPU as its vendor's datasheet describes it; products are dense and accumulated in fp32.

    Attributes:
        name: the vendor's.
        bandwidth: bytes a second of its memory.
        tensor_flops: FLOP/s of bf16 and fp16 products on tensor cores.
        fp32_flops: FLOP/s of fp32 products without tensor cores.
        multiprocessors: their number.
    """

    name: str
    bandwidth: float
    tensor_flops: float
    fp32_flops: float
    multiprocessors: int


GPUS = {
    "a100": GPU("A100 SXM4 80GB", 2.039e12, 312e12, 19.5e12, 108),
    "h100": GPU("H100 SXM5 80GB", 3.35e12, 989e12, 67e12, 132),
    "h200": GPU("H200 SXM5 141GB", 4.8e12, 989e12, 67e12, 132),
    "b200": GPU("B200 180GB", 8.0e12, 2250e12, 75e12, 148),
    "l4": GPU("L4", 0.3e12, 121e12, 30.3e12, 58),
    "rtx4090": GPU("GeForce RTX 4090", 1.008e12, 165e12, 82.6e12, 128),
}


class Work(NamedTuple):
    """Bytes that must be moved and FLOPs that must be computed, at least."""

    nbytes: float = 0.0
    flops: float = 0.0


class Ceilings(NamedTuple):
    """Bandwidth in bytes a second, FLOP/s in the dtype of the products, seconds a kernel, and their source."""

    bandwidth: float
    flops: float
    kernel_seconds: float
    source: str

    def seconds(self, work: Work) -> float:
        """The least time in which `work` can be done."""
        return max(work.nbytes / self.bandwidth, work.flops / self.flops)

    def limiter(self, work: Work) -> str:
        """ "memory" or "compute"."""
        return "memory" if work.nbytes / self.bandwidth >= work.flops / self.flops else "compute"


def measured(ceilings: dict[str, float], source: str = "") -> Ceilings:
    """Ceilings from `calibration.calibrate`."""
    bandwidth = max(ceilings["copy_bytes_s"], ceilings["read_bytes_s"])
    kernel_seconds = ceilings.get("graph_kernel_us", 1e6 * KERNEL_SECONDS) / 1e6
    return Ceilings(bandwidth, ceilings["matmul_flops_s"], kernel_seconds, source)


def floor_seconds(ceilings: dict[str, float], nbytes: float, flops: float = 0.0) -> float:
    """The least time in which these bytes can be moved and these FLOPs computed, under ceilings from
    `calibration.calibrate`."""
    return measured(ceilings).seconds(Work(nbytes, flops))


def datasheet(device: str, dtype: str) -> Ceilings:
    """Ceilings of one of `GPUS`."""
    if device not in GPUS:
        raise ValueError(f"plan: device must be one of {', '.join(GPUS)} or cpu, got {device!r}")
    has = GPUS[device]
    flops = has.fp32_flops if dtype == "fp32" else has.tensor_flops
    return Ceilings(has.bandwidth, flops, KERNEL_SECONDS, f"datasheet of {has.name}")


def calibrated(path: pathlib.Path, device: str, dtype: str) -> Ceilings:
    """Ceilings that `calibration` measured. It measures bf16 products; fp32 products are the datasheet's.

    Raises:
        ValueError: the file is not such a calibration, or not of this device.
    """
    try:
        found = json.loads(path.read_text())
        name = found["device"]
        ceilings = measured(found["ceilings"], f"measured on {name}, {path}")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"plan: {path} must be a calibration.json of tools.calibration, got {error!r}") from None
    if device not in _plain(name):
        raise ValueError(f"plan: calibration must be of {device}, got one of {name!r}")
    return ceilings._replace(flops=GPUS[device].fp32_flops) if dtype == "fp32" else ceilings


def ceilings_of(device: str, dtype: str, calibration: pathlib.Path | None = None) -> Ceilings:
    """Ceilings from `calibration` if it is given, else from bench/results if they were measured there on this device,
    else from the datasheet."""
    if calibration is not None:
        return calibrated(calibration, device, dtype)
    for path in sorted(RESULTS.glob("*/calibration.json")):
        if device in _plain(json.loads(path.read_text()).get("device", "")):
            return calibrated(path, device, dtype)
    return datasheet(device, dtype)


def _plain(device: str) -> str:
    return device.lower().replace(" ", "")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a dense decoder that decide the bytes and FLOPs of a forward.

    Attributes:
        name: for reports.
        weights: elements that a forward reads: all but input embeddings, which count if the head is tied to them.
        layers: number of decoder layers.
        kv: elements of keys and values a token, all layers.
        attention: query heads * head dim, all layers.
        vocab: logits of a row.
        weight_bytes: of `weights`.
        itemsize: bytes of an element of keys, values and logits.
    """

    name: str
    weights: int
    layers: int
    kv: int
    attention: int
    vocab: int = 0
    weight_bytes: float = 0.0
    itemsize: int = 0

    def stored(self, bits: float, itemsize: int) -> "Shape":
        """The same model with `bits` bits a weight; `itemsize` as above."""
        return dataclasses.replace(self, weight_bytes=self.weights * bits / 8, itemsize=itemsize)


def shape_of(model: Any, name: str = "") -> Shape:
    """The shape of a transformers model with plain keys and values; its weights may be on the meta device."""
    config = model.config.get_text_config()
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    left_out = {id(parameter) for parameter in embedding.parameters()}
    left_out -= {id(parameter) for parameter in head.parameters()} if head is not None else set()
    read = [parameter for parameter in model.parameters() if id(parameter) not in left_out]
    return Shape(
        name,
        sum(parameter.numel() for parameter in read),
        layers,
        kv=2 * kv_heads * head_dim * layers,
        attention=heads * head_dim * layers,
        vocab=config.vocab_size,
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in read),
        itemsize=model.dtype.itemsize,
    )


def forward_work(shape: Shape, batch: int, rows: float, context: float) -> Work:
    """One forward of `rows` rows of each sequence over `context` tokens."""
    all_rows, slots = batch * rows, context + rows
    moved = batch * slots * shape.kv + all_rows * shape.vocab
    flops = 2 * all_rows * shape.weights + 4 * all_rows * slots * shape.attention
    return Work(shape.weight_bytes + moved * shape.itemsize, flops)


def attention_work(
    batch: int, query_heads: int, kv_heads: int, head_dim: int, context: int, rows: int, itemsize: int
) -> Work:
    """Attention of one layer: keys, values, queries and outputs are moved once; both products are computed."""
    slots = batch * (context + rows)
    elements = head_dim * (2 * slots * kv_heads + 2 * batch * rows * query_heads)
    return Work(itemsize * elements, 4 * slots * rows * query_heads * head_dim)


def round_work(
    target: Shape,
    batch: int,
    nodes: float,
    context: float,
    accepted: float = 0.0,
    draft: Shape | None = None,
    draft_forwards: float = 0.0,
) -> dict[str, Work]:
    """The least work of each stage of a round.

    Args:
        target: the target model.
        batch: B.
        nodes: N, the root included.
        context: tokens in the cache, on average.
        accepted: accepted draft tokens of a sequence, whose keys and values move; 0 for a chain, which is in place.
        draft, draft_forwards: the draft model, and its forwards in a round. None: drafting takes no time.
    """
    one = forward_work(draft, batch, 1, context) if draft else Work()
    return {
        "draft": Work(draft_forwards * one.nbytes, draft_forwards * one.flops),
        "verify": forward_work(target, batch, nodes, context),
        "accept": Work(batch * nodes * target.vocab * target.itemsize),
        "compact": Work(2 * batch * accepted * target.kv * target.itemsize),
        "emit": Work(),
    }


def efficiency_bytes(
    target: Shape, batch: int, context: float, draft: Shape | None = None, draft_forwards: float = 0.0
) -> float:
    """The bytes of the round efficiency eta: the target's weights, its keys and values, and the draft's weights once
    for each of its forwards."""
    drafting = draft_forwards * draft.weight_bytes if draft else 0.0
    return target.weight_bytes + batch * context * target.kv * target.itemsize + drafting
