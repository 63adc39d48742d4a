"""The base class of channels."""

from __future__ import annotations


class Channel:
    """Carries one payload from one side to the other. It must be a function of the payload and its own settings."""

    def deliver(self, payload: bytes) -> bytes:
        """The payload as the other side receives it. ``payload`` is made by `rayfed.wire.encode`."""
        raise NotImplementedError
