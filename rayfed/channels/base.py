"""The base class of channels."""

from __future__ import annotations


class Channel:
    """Carries one payload from one end to the other. The result depends on the payload and the settings only."""

    def deliver(self, payload: bytes) -> bytes:
        """The payload as the other end receives it. `rayfed.wire.encode` made ``payload``."""
        raise NotImplementedError
