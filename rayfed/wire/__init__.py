"""What passes between server and client: which entries travel, as which bytes, and how many of them there were.

Nothing else in rayfed makes these bytes. Pure tensor code: no Ray, no models, no I/O but the ledger's files.
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
