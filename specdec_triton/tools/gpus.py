"""GPUs by their vendor's datasheets: what `inspect` and `plan` go by where nothing was measured."""

from typing import NamedTuple


class Card(NamedTuple):
    """Ceilings of a card; products are dense, accumulated in fp32.

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
