"""The types in which keys and values are kept in the KV cache, by the names of `--kv-cache-dtype`. Free of torch."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class KVFormat:
    """The size of a row of the KV cache, which is the key or the value of one token and one KV head.

    int8 keeps a scale for each row, as bfloat16: a code is multiplied with it. A scale for several tokens would change
    when one of them is added, and with it numbers that were stored before. The FP8 types have no scales, as in vLLM
    without calibration: numbers beyond their range become the largest one.
    """

    name: str
    item_bytes: int
    scale_bytes: int = 0

    def row_bytes(self, head_dim: int) -> int:
        return head_dim * self.item_bytes + self.scale_bytes


KV_FORMATS = {
    each.name: each
    for each in (
        KVFormat("float32", 4),
        KVFormat("bfloat16", 2),
        KVFormat("float16", 2),
        KVFormat("int8", 1, scale_bytes=2),
        KVFormat("fp8_e4m3", 1),
        KVFormat("fp8_e5m2", 1),
    )
}
