"""The coding of the values that travel: fp32, bf16, fp16, int8, or qsgd2 to qsgd8.

``fp32`` keeps every bit pattern, negative zeros and NaN payloads included. bf16, fp16 and int8 round to the nearest
value (ties to even); qsgd2 to qsgd8 round at random and without bias (`qsgd.py`). All give the same bits on every
machine, and never turn a finite value into an infinity. All bytes are little-endian.

======  ===============================  ====================================================================
format  bytes for c values               error of a finite value v
======  ===============================  ====================================================================
fp32    4 c                              none
bf16    2 c                              2^-8 abs(v), at most 2^-134 under 1.2e-38; saturates at 3.39e38
fp16    2 c                              2^-11 abs(v), at most 2^-25 under 6.1e-5; saturates at 65504
int8    c + 4 ceil(c / 256)              1/254 of the largest magnitude among the 256 values of its block
qsgdB   ceil(B c / 8) + 4 ceil(c / 256)  below 1/(2^(B-1) - 1) of that magnitude; 0 in the mean
======  ===============================  ====================================================================
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

from rayfed.wire.qsgd import BITS, decode_qsgd, encode_qsgd, qsgd_bytes

FORMATS = ("fp32", "bf16", "fp16", "int8", *BITS)
"""The value formats. The index of a format in this tuple is its number in the payload header."""

_BLOCK = 256  # int8 values that share a scale
_HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

assert sys.byteorder == "little", "rayfed writes tensors as they are in memory and needs a little-endian machine"


def value_bytes(count: int, format: str) -> int:
    """How many bytes ``count`` values take in ``format``.

    Raises:
        ValueError: ``format`` is none of ``FORMATS``.
    """
    if format not in FORMATS:
        raise ValueError(f"values: got {format!r}, but the formats are {', '.join(FORMATS)}")
    if format == "int8":
        return count + 4 * _blocks(count)
    if format in BITS:
        return qsgd_bytes(count, BITS[format])
    return count * (4 if format == "fp32" else 2)


def encode_values(x: Tensor, format: str, seed: int | None = None) -> bytes | memoryview:
    """Writes a flat vector in one of ``FORMATS``.

    Args:
        x: float32, shape (count,), on the CPU.
        format: one of ``FORMATS``. bf16 and fp16 keep infinities and write every NaN as the same bits.
        seed: at least 0, of the random rounding of qsgd2 to qsgd8, which need it. The other formats ignore it.

    Returns:
        ``value_bytes(count, format)`` bytes, a function of the arguments alone. For fp32 they may share memory with
        ``x``.

    Raises:
        ValueError: the format is unknown, ``x`` has a NaN or an infinity that the format (int8, qsgd2 to qsgd8) cannot
            write, or there is no seed and the format needs one.
    """
    value_bytes(0, format)  # refuses an unknown format
    if format == "fp32":
        return np.ascontiguousarray(x.numpy()).view(np.uint8).data
    if format == "int8":
        return _encode_int8(x)
    if format in BITS:
        if seed is None:
            raise ValueError(f"seed: {format} rounds at random and needs one")
        return encode_qsgd(x.numpy(), BITS[format], seed)
    return _to_half(x, _HALF[format]).view(torch.int16).numpy().tobytes()


def decode_values(data: bytes | memoryview, count: int, format: str) -> Tensor:
    """Reads back what ``encode_values`` wrote.

    Args:
        data: exactly the bytes of the value section.
        count: how many values there are.
        format: the format they were written in.

    Returns:
        float32, shape (count,), on the CPU, in memory of its own.

    Raises:
        ValueError: unknown format, or wrong length.
    """
    expected = value_bytes(count, format)
    if len(data) != expected:
        raise ValueError(f"values: {count} values in {format} take {expected} bytes, not {len(data)}")
    if format == "fp32":
        return torch.from_numpy(np.frombuffer(data, np.float32).copy())
    if format == "int8":
        return _decode_int8(data, count)
    if format in BITS:
        return torch.from_numpy(decode_qsgd(data, count, BITS[format]))
    return torch.from_numpy(np.frombuffer(data, np.int16).copy()).view(_HALF[format]).float()


def _to_half(x: Tensor, dtype: torch.dtype) -> Tensor:
    limit = torch.finfo(dtype).max
    half = x.clamp(-limit, limit).to(dtype)
    special = ~torch.isfinite(x)
    if special.any():
        # A cast of NaN gives different bits in vector code and in scalar code, so every NaN is set to the same bits.
        half[special] = x[special].to(dtype)
        half[x.isnan()] = torch.nan
    return half


def _blocks(count: int) -> int:
    return -(-count // _BLOCK)


def _encode_int8(x: Tensor) -> bytes:
    """The largest magnitude of each block (fp32), then one signed byte per value: round(127 v / largest)."""
    padded = np.zeros((_blocks(x.numel()), _BLOCK), np.float32)
    padded.reshape(-1)[: x.numel()] = x.numpy()
    largest = np.abs(padded).max(axis=1)
    if not np.isfinite(largest).all():
        raise ValueError("x: holds NaN or an infinity, which int8 cannot write; use fp32, bf16 or fp16")
    # Dividing first keeps the ratio within [-1, 1] for very small and very large blocks. Blocks of zeros divide by 1.
    padded /= np.where(largest == 0, np.float32(1), largest)[:, None]
    padded *= np.float32(127)
    levels = np.rint(padded, out=padded).astype(np.int8).reshape(-1)[: x.numel()]
    return b"".join([largest.tobytes(), levels.tobytes()])


def _decode_int8(data: bytes | memoryview, count: int) -> Tensor:
    blocks = _blocks(count)
    largest = np.frombuffer(data, np.float32, blocks)
    levels = np.frombuffer(data, np.int8, count, offset=4 * blocks)
    padded = np.zeros((blocks, _BLOCK), np.float32)
    padded.reshape(-1)[:count] = levels
    padded /= np.float32(127)
    padded *= largest[:, None]
    return torch.from_numpy(padded.reshape(-1)[:count].copy())
