"""Messages between server and client: choosing the entries to send, encoding them as bytes, and counting the bytes.

All bytes that a run counts are made here. Pure tensor code: no Ray, no models, no settings. Only the ledger reads and
writes files.
"""

from rayfed.wire.codec import HEADER_BYTES, Payload, Sizes, WireError, decode, encode, inspect
from rayfed.wire.indices import MAX_LENGTH, Coding, decode_indices, encode_indices
from rayfed.wire.ledger import DIRECTIONS, Direction, Ledger
from rayfed.wire.sparsify import keep_count, top_k, top_mask
from rayfed.wire.values import FORMATS, decode_values, encode_values, value_bytes

__all__ = [
    "DIRECTIONS",
    "FORMATS",
    "HEADER_BYTES",
    "MAX_LENGTH",
    "Coding",
    "Direction",
    "Ledger",
    "Payload",
    "Sizes",
    "WireError",
    "decode",
    "decode_indices",
    "decode_values",
    "encode",
    "encode_indices",
    "encode_values",
    "inspect",
    "keep_count",
    "top_k",
    "top_mask",
    "value_bytes",
]
