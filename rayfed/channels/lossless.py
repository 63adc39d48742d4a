"""Every bit arrives. Number formats and sparsity are the wire's settings, not the channel's."""

from __future__ import annotations

from rayfed.channels.base import Channel


class Lossless(Channel):
    """The payload arrives as it was sent."""

    def deliver(self, payload: bytes) -> bytes:
        return payload
