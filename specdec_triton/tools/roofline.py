"""The roofline: bytes and FLOPs of a forward, of an op and of a round, a device's ceilings, and the time between them.

    datasheet("h100", "bf16").seconds(forward_work(shape_of(model), batch=1, rows=64, context=2048))

All of it is a floor: weights, keys and values are read once, the logits are written once, activations are left out.
"""

import dataclasses
import json
import pathlib
from typing import Any, NamedTuple

KERNEL_SECONDS = 1e-6  # from one kernel of a CUDA graph to the next, if it was not measured
RESULTS = pathlib.Path(__file__).resolve().parents[2] / "bench" / "results"


class Card(NamedTuple):
    """A GPU by its vendor's datasheet; products are dense, accumulated in fp32.

    Attributes:
        name: as the vendor calls it.
        bandwidth: of its memory, bytes a second.
        tensor_flops: of bf16 and fp16 products on tensor cores, a second.
        fp32_flops: of fp32 products without them, a second.
        multiprocessors: their number.
    """

    name: str
    bandwidth: float
    tensor_flops: float
    fp32_flops: float
    multiprocessors: int


CARDS = {
    "a100": Card("A100 SXM4 80GB", 2.039e12, 312e12, 19.5e12, 108),
    "h100": Card("H100 SXM5 80GB", 3.35e12, 989e12, 67e12, 132),
    "h200": Card("H200 SXM5 141GB", 4.8e12, 989e12, 67e12, 132),
    "b200": Card("B200 180GB", 8.0e12, 2250e12, 75e12, 148),
    "l4": Card("L4", 0.3e12, 121e12, 30.3e12, 58),
    "rtx4090": Card("GeForce RTX 4090", 1.008e12, 165e12, 82.6e12, 128),
}


class Work(NamedTuple):
    """The least that must be moved and computed."""

    nbytes: float = 0.0
    flops: float = 0.0


class Ceilings(NamedTuple):
    """Bandwidth in bytes a second, flops a second in the dtype of the products, seconds a kernel, and their source."""

    bandwidth: float
    flops: float
    kernel_seconds: float
    source: str

    def seconds(self, work: Work) -> float:
        """The least time in which so much can be moved and computed."""
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
    """The least time in which so much can be moved and computed, under ceilings from `calibration.calibrate`."""
    return measured(ceilings).seconds(Work(nbytes, flops))


def datasheet(card: str, dtype: str) -> Ceilings:
    """Ceilings of one of `CARDS`."""
    if card not in CARDS:
        raise ValueError(f"plan: card must be one of {', '.join(CARDS)}, got {card!r}")
    has = CARDS[card]
    flops = has.fp32_flops if dtype == "fp32" else has.tensor_flops
    return Ceilings(has.bandwidth, flops, KERNEL_SECONDS, f"datasheet of {has.name}")


def calibrated(path: pathlib.Path, card: str, dtype: str) -> Ceilings:
    """Ceilings that `calibration` measured; fp32 products are the datasheet's, since it measures bf16.

    Raises:
        ValueError: the file is not such a calibration, or not of this card.
    """
    try:
        found = json.loads(path.read_text())
        device = found["device"]
        ceilings = measured(found["ceilings"], f"measured on {device}, {path}")
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"plan: {path} must be a calibration.json of tools.calibration, got {error!r}") from None
    if card not in _plain(device):
        raise ValueError(f"plan: calibration must be of {card}, got one of {device!r}")
    return ceilings._replace(flops=CARDS[card].fp32_flops) if dtype == "fp32" else ceilings


def ceilings_of(card: str, dtype: str, calibration: pathlib.Path | None = None) -> Ceilings:
    """Measured, if `calibration` is given or bench/results has one of this card; else the datasheet's."""
    if calibration is not None:
        return calibrated(calibration, card, dtype)
    for path in sorted(RESULTS.glob("*/calibration.json")):
        if card in _plain(json.loads(path.read_text()).get("device", "")):
            return calibrated(path, card, dtype)
    return datasheet(card, dtype)


def _plain(device: str) -> str:
    return device.lower().replace(" ", "")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a dense decoder, as far as a forward reads, computes or writes them.

    Attributes:
        name: for reports.
        weights: elements that a forward reads: all but input embeddings, which count if they are the head as well.
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
    """Of a transformers model with plain keys and values. Its weights may be on the meta device."""
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
    """Attention of one layer: keys, values, queries and outputs moved once, and both products."""
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
    """The floor of every stage of a round.

    Args:
        target: the target model.
        batch: B.
        nodes: N, the root included.
        context: tokens in the cache, on average.
        accepted: draft tokens accepted a sequence, whose keys and values move; 0 if paths are in place (a chain).
        draft: the draft model, and how often it runs in a round. None: drafting costs nothing.
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
    """Bytes that the round efficiency eta counts: the target's weights, its keys and values, and the draft's weights
    once for each of its forwards."""
    drafting = draft_forwards * draft.weight_bytes if draft else 0.0
    return target.weight_bytes + batch * context * target.kv * target.itemsize + drafting
