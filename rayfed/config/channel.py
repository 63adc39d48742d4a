"""The section that says what happens between the messages that are sent and those that arrive: channel."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rayfed.config.describe import mistake
from rayfed.config.types import UNSIGNED, NonNegative, Section

Decibels = Annotated[float, Field(ge=-200, le=200), UNSIGNED]


class Channel(Section):
    """The channel of the uploads. docs/weights-and-channels.md has the equations."""

    kind: Literal["lossless", "over_the_air"] = "lossless"
    """`lossless`: every bit arrives. `over_the_air`: all clients of a round send at once over one fading channel, and
    the server receives their weighted sum with noise (AirComp).
    """
    power: Annotated[float, Field(ge=1e-6, le=1e6)] = 1.0
    """For `over_the_air`: P0, the largest mean power of a client's signal per channel use."""
    snr: Decibels | None = None
    """For `over_the_air`: P0 over the power of the receiver's noise, in decibels. Either `snr` or `noise` is given."""
    noise: NonNegative | None = None
    """For `over_the_air`: sigma^2, the power of the receiver's complex noise; 0: none."""
    truncation: NonNegative = 0.0
    """For `over_the_air`: clients whose channel gain |h|^2, of mean 1, is below this do not send in the round. 0: all
    clients send, and a single weak channel makes the noise of all of them large.
    """

    def mistakes(self) -> Iterator[str]:
        if self.kind == "lossless":
            for field in ("power", "snr", "noise", "truncation"):
                if (value := getattr(self, field)) != Channel.model_fields[field].default:
                    what = "that belongs to channel.kind=over_the_air, and the kind is lossless"
                    yield mistake(f"channel.{field}", value, what)
        elif (self.snr is None) == (self.noise is None):
            either = "either channel.snr or channel.noise is given (channel.noise=0: no noise)"
            yield mistake("channel.snr", self.snr, f"with channel.kind=over_the_air {either}")
