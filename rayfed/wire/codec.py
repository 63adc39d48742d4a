"""The payload: the bytes that pass between server and client.

A payload can be read without further information. Equal arguments give equal bytes. A CRC-32 covers every byte except
its own four, so a truncated or extended payload, or one with a flipped bit, is refused. The byte counts of header,
indices and values add up to the payload's length.

A payload of format version 1, little-endian throughout:

    magic "rfed"  u8 version  u8 value format  u8 index coding
    u32 n  u32 k  u32 index bytes  u64 value bytes  u32 CRC-32
    index section (none when every entry travels)
    value section (k values, in the order of their indices)
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from rayfed.wire.indices import MAX_LENGTH, Coding, decode_indices, encode_indices
from rayfed.wire.values import FORMATS, decode_values, encode_values, value_bytes

VERSION = 1
"""The payload format that this code writes and reads."""

_MAGIC = b"rfed"
_FIELDS = struct.Struct("<4sBBBIIIQ")
_CRC = struct.Struct("<I")
HEADER_BYTES = _FIELDS.size + _CRC.size
"""Bytes before the index section: 31."""


class WireError(ValueError):
    """The bytes are not a complete, undamaged payload of a known version. The message gives the reason in one line."""


@dataclass(frozen=True)
class Sizes:
    """What a payload's header states. The three byte counts add up to the payload's length."""

    n: int
    """Length of the dense vector."""
    count: int
    """Values that travel: the count that papers report."""
    bytes_header: int
    bytes_indices: int
    bytes_values: int
    checksum: int = 0
    """The payload's CRC-32; 0 where only the sizes of a message are known."""


@dataclass(frozen=True, eq=False)
class Payload:
    """A decoded payload: ``values`` at ``indices`` of a float32 vector of length ``n``, zeros elsewhere."""

    n: int
    indices: Tensor | None
    """int64, shape (count,), strictly increasing; None when every entry travels."""
    values: Tensor
    """float32, shape (count,)."""

    @property
    def count(self) -> int:
        """Values that travelled."""
        return self.values.numel()

    def dense(self) -> Tensor:
        """The vector that the receiver gets: float32, shape (n,), a new tensor on the CPU."""
        if self.indices is None:
            return self.values.clone()
        return torch.zeros(self.n).index_copy_(0, self.indices, self.values)


def encode(x: Tensor, *, indices: Tensor | None = None, values: str = "fp32", seed: int | None = None) -> bytes:
    """Writes a vector, or some of its entries, as a payload.

    Args:
        x: float32, shape (n,), any device, n up to ``MAX_LENGTH``.
        indices: int64, shape (k,), strictly increasing within 0 to n - 1: only ``x[indices]`` travels.
            None: every entry travels, and there are no index bytes.
        values: the value format, one of ``FORMATS``.
        seed: at least 0, of the random rounding of qsgd2 to qsgd8, which need it. Each message has a seed of its own,
            so that the errors of two messages are independent. The other formats ignore it.

    Returns:
        The payload: a pure function of the arguments.

    Raises:
        ValueError: an argument not as described, or values that the format cannot write (see ``encode_values``).
    """
    if x.ndim != 1 or x.dtype != torch.float32 or x.numel() > MAX_LENGTH:
        raise ValueError(f"x: got {x.dtype} of shape {tuple(x.shape)}, but a payload carries a flat float32 vector")
    x = x.detach().cpu()
    coding, index_section, travelling = Coding.ALL, b"", x
    if indices is not None:
        if indices.dtype != torch.int64:  # as an index, uint8 would be a mask
            raise ValueError(f"indices: got {indices.dtype}, but they must be int64")
        indices = indices.cpu()
        coding, index_section = encode_indices(indices.numpy(), x.numel())
        travelling = x.index_select(0, indices)
    written = encode_values(travelling, values, seed)
    lengths = (x.numel(), travelling.numel(), len(index_section), len(written))
    fields = _FIELDS.pack(_MAGIC, VERSION, FORMATS.index(values), coding, *lengths)
    crc = zlib.crc32(written, zlib.crc32(index_section, zlib.crc32(fields)))
    return b"".join([fields, _CRC.pack(crc), index_section, written])


def decode(data: bytes | memoryview) -> Payload:
    """Reads a payload and checks every byte of it.

    Args:
        data: one whole payload, as ``encode`` returned it; may be read-only.

    Returns:
        The payload. Its tensors are on the CPU and share no memory with ``data``.

    Raises:
        WireError: too short, wrong magic, another version, another length, checksum mismatch, or sections that
            contradict each other.
    """
    view = memoryview(data).cast("B")
    sizes, coding, format = _read_header(view)
    values_at = HEADER_BYTES + sizes.bytes_indices
    crc = zlib.crc32(view[HEADER_BYTES:], zlib.crc32(view[: _FIELDS.size]))
    if crc != sizes.checksum:
        raise WireError("payload: checksum mismatch, the bytes were damaged on the way")
    try:
        values = decode_values(view[values_at:], sizes.count, format)
        indices = None
        if coding != Coding.ALL:
            indices = torch.from_numpy(decode_indices(coding, view[HEADER_BYTES:values_at], sizes.n, sizes.count))
    except ValueError as error:
        raise WireError(f"payload: {error}") from None
    return Payload(sizes.n, indices, values)


def inspect(data: bytes | memoryview) -> Sizes:
    """The sizes and the checksum that a payload states. No section is read, and the checksum is not compared.

    Raises:
        WireError: as ``decode``, except for damage that only the checksum or the sections show.
    """
    return _read_header(memoryview(data).cast("B"))[0]


def _read_header(view: memoryview) -> tuple[Sizes, int, str]:
    """The header's sizes, index coding and value format. Checks everything that can be checked without the sections."""
    if len(view) < HEADER_BYTES:
        raise WireError(f"payload: too short, {len(view)} bytes where the header alone takes {HEADER_BYTES}")
    magic, version, format, coding, n, count, bytes_indices, bytes_values = _FIELDS.unpack_from(view)
    if magic != _MAGIC:
        raise WireError(f"payload: wrong magic {magic!r}, these bytes were not written by rayfed")
    if version != VERSION:
        raise WireError(f"payload: got format version {version}, but this rayfed reads version {VERSION}")
    whole = HEADER_BYTES + bytes_indices + bytes_values
    if len(view) != whole:
        raise WireError(f"payload: {len(view)} bytes where the header announces {whole}")
    if format >= len(FORMATS):
        raise WireError(f"payload: unknown value format {format}")
    # The length of the value section must fit the count. So a false count cannot make `decode` allocate memory.
    if not count <= n <= MAX_LENGTH or bytes_values != value_bytes(count, FORMATS[format]):
        raise WireError(f"payload: {count} of {n} entries do not take {bytes_values} value bytes in {FORMATS[format]}")
    if coding in (Coding.ALL, Coding.NONE) and (count != (n if coding == Coding.ALL else 0) or bytes_indices):
        raise WireError(f"payload: {count} of {n} entries and {bytes_indices} index bytes contradict its index coding")
    checksum = _CRC.unpack_from(view, _FIELDS.size)[0]
    return Sizes(n, count, HEADER_BYTES, bytes_indices, bytes_values, checksum), coding, FORMATS[format]
