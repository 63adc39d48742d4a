"""Numbers as text, for the console, tables and reports. None is `-`. MB are 1e6 bytes."""

from __future__ import annotations

from rayfed.tracking.sinks import Scalar

IN_PERCENT = (
    "accuracy", "accuracy_masked", "accuracy_clients", "accuracy_clients_p10", "accuracy_clients_p50",
    "accuracy_clients_p90", "accuracy_clients_std", "accuracy_clients_worst", "accuracy_unseen", "gap",
)  # fmt: skip


def loss(value: float | None) -> str:
    """`1.234`; from 1000 on `1.2e+03`."""
    return "-" if value is None else f"{value:.3f}" if abs(value) < 1000 else f"{value:.1e}"


def percent(value: float | None) -> str:
    """`71.2 %` from 0.712."""
    return "-" if value is None else f"{100 * value:.1f} %"


def megabytes(count: float | None) -> str:
    """Bytes as MB, with two or three significant digits."""
    if count is None:
        return "-"
    size = count / 1e6
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or size == 0 else 4
    return f"{size:.{digits}f}"


def clock(seconds: float) -> str:
    """`0:31`, `12:05`, `1:02:03`, and from 100 hours on `4d 12h`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 100:
        return f"{hours // 24}d {hours % 24}h"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def short(value: Scalar) -> str:
    """`1,234,567`, `0.7123`, or the text itself."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def round_of(number: int, rounds: int) -> str:
    """`round  9/12`, as wide for every number."""
    return f"round {number:>{len(str(rounds))}}/{rounds}"


def format_mean(centre: float | None, deviation: float | None, key: str) -> str:
    """`81.23 ± 0.45 %`, `0.4321 ± 0.0012`; without the deviation if there is none."""
    if centre is None:
        return "-"
    percent = key.rpartition("/")[2] in IN_PERCENT
    scale, digits = (100, 2) if percent else (1, 4)
    around = "" if deviation is None else f" ± {scale * deviation:.{digits}f}"
    return f"{scale * centre:.{digits}f}{around}{' %' if percent else ''}"


def format_mb(size: float | None, digits: int = 3) -> str:
    """Bytes as MB, 1e6 bytes."""
    return "-" if size is None else f"{size / 1e6:.{digits}f}"
