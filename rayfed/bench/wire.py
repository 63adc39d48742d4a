"""The wire: encoding and decoding an adapter, and selecting its largest entries; bytes against the entropy bound.

"GB/s" counts the dense vector in fp32, ``4 n`` bytes, over the processor time of encoding and decoding together. One
thread is used, so it is per core. Decoding gives the values and their indices, which are all that the server adds up.
"ms to dense" is the further time in which a client makes a dense vector of them. B sends the vector as it is in
memory: two copies, no checksum. The bound, n H(d) / 8 bytes, is the entropy of a random set of density d; where the
density differs from layer to layer, a code may need fewer bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rayfed import wire
from rayfed.bench.timing import Row, one_thread, paired, timed

DENSITIES = (1.0, 1 / 4, 1 / 16, 1 / 64)


@one_thread
def measure(entries: int = 600_000, pairs: int = 25) -> list[Row]:
    """Encode and decode at four densities, one set with layers of unlike density, then top-k at the same densities."""
    x = torch.randn(entries, generator=torch.Generator().manual_seed(0))
    uneven = x * torch.tensor([1.0, 0.4, 0.7, 0.25])[torch.arange(entries) // 12_000 % 4]
    rows = [_coding(f"wire {_named(d)}", x, d, pairs) for d in DENSITIES]
    rows.append(_coding("wire 1/16, layers differ", uneven, 1 / 16, pairs))
    return rows + [_selection(x, d, pairs) for d in DENSITIES[1:]]


def _coding(name: str, x: Tensor, density: float, pairs: int) -> Row:
    n, k = x.numel(), wire.keep_count(x.numel(), density)
    indices = None if k == n else wire.top_k(x, k)
    sizes = wire.inspect(wire.encode(x, indices=indices))
    bound = entropy_bytes(n, k)

    def coded() -> wire.Payload:
        return wire.decode(wire.encode(x, indices=indices))

    def copied() -> Tensor:
        return torch.frombuffer(bytearray(x.numpy().tobytes()), dtype=torch.float32)

    facts: dict[str, float] = {"index bytes": sizes.bytes_indices, "entropy bound": math.ceil(bound)}
    if bound:
        facts["over the bound, %"] = 100 * (sizes.bytes_indices / bound - 1)
    row = paired(name, (f"encode and decode {n} entries", coded), ("two copies", copied), pairs, facts)
    row.facts["GB/s"] = 4e-9 * n / (row.cpu_a or row.seconds_a)
    payload = coded()
    row.facts["ms to dense"] = 1e3 * min(timed(payload.dense)[0].wall for _ in range(pairs))
    return row


def _selection(x: Tensor, density: float, pairs: int) -> Row:
    k = wire.keep_count(x.numel(), density)
    ours = (f"top-k of {x.numel()}", lambda: wire.top_k(x, k))
    return paired(f"top-k {_named(density)}", ours, ("torch.topk, sorted", lambda: x.abs().topk(k)[1].sort()), pairs)


def entropy_bytes(n: int, k: int) -> float:
    """n H(k / n) in bytes."""
    p = k / n if n else 0.0
    return -n * (p * math.log2(p) + (1 - p) * math.log2(1 - p)) / 8 if 0 < p < 1 else 0.0


def _named(density: float) -> str:
    return "1" if density == 1 else f"1/{1 / density:g}"
