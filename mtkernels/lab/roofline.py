"""Static roofline: no launch is faster than its memory traffic or its matrix FLOPs at a card's published peaks.

Peaks are dense and those of NVIDIA's data sheets: A100 80GB SXM (2021), H100 SXM (2022; the sheet shows twice these, with
sparsity), HGX B200 (2024, one GPU of it). float32 products take the TF32 rate, which no other path exceeds.
"""

from dataclasses import dataclass

LABEL = "bound, not measured"
_BITS = {"bf16": 16, "fp16": 16, "bfloat16": 16, "float16": 16, "fp32": 32, "float32": 32, "fp64": 64, "float64": 64}


@dataclass(frozen=True)
class Card:
    """Memory bytes/s, and matrix FLOP/s by bits of an operand's element."""

    bandwidth: float
    flops: dict


CARDS = {
    "A100": Card(2.039e12, {8: 624e12, 16: 312e12, 32: 156e12, 64: 19.5e12}),
    "H100": Card(3.35e12, {8: 1979e12, 16: 989.5e12, 32: 494.7e12, 64: 67e12}),
    "B200": Card(8e12, {8: 4500e12, 16: 2250e12, 32: 1125e12, 64: 40e12}),
}


def element_bits(dtype):
    """Bits of an element by Triton's or torch's name of its type; every 8-bit and smaller type counts as 8."""
    return _BITS.get(dtype, 8)


def bound_us(launches, card):
    """Microseconds below which these launches, one after another with nothing kept in cache between them, cannot go."""
    peak = CARDS[card]

    def seconds(launch):
        arithmetic = sum(n / peak.flops[element_bits(dtype)] for dtype, n in launch.flops.items())
        return max(launch.distinct_bytes / peak.bandwidth, arithmetic)

    return 1e6 * sum(map(seconds, launches))
