"""Messages between server and client: choosing the entries to send, encoding them as bytes, and counting the bytes.

All bytes that a run counts are made here. Pure tensor code: no Ray, no models, no settings. Only the ledger reads and
writes files.
"""

from rayfed.wire.codec import HEADER_BYTES, Payload, Sizes, decode, encode, inspect
from rayfed.wire.ledger import Direction, Ledger
from rayfed.wire.sparsify import keep_count, top_k, top_mask

__all__ = [
    "HEADER_BYTES", "Direction", "Ledger", "Payload", "Sizes", "decode", "encode", "inspect", "keep_count", "top_k",
    "top_mask",
]  # fmt: skip
