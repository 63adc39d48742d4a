"""A full disk: commands whose folder is a file system of limited size, a tmpfs in a mount namespace of their own."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

SCRIPT = """
mount -t tmpfs -o size="$1" tmpfs "$2" || exit 99
folder=$2 copy=$3
shift 3
"$@"
code=$?
cp -a "$folder/." "$copy"
exit $code
"""


@cache
def can_limit() -> bool:
    """Whether this machine lets a process mount file systems in a namespace of its own."""
    try:
        return subprocess.run(_inside("mount -t tmpfs tmpfs /mnt"), capture_output=True, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def run_on_full_disk(
    command: Sequence[str], size: int, folder: Path, copy: Path, environment: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Runs the command while ``folder`` is an empty file system of ``size`` bytes; what it then holds is in ``copy``.

    The kernel rounds ``size`` up to whole pages.
    """
    for path in (folder, copy):
        path.mkdir(parents=True, exist_ok=True)
    words = [*_inside(SCRIPT), "sh", str(size), str(folder), str(copy), *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, env=environment)


def sizes(seed: int, count: int, smallest: int, largest: int) -> list[int]:
    """``count`` sizes in bytes, one drawn from each of as many equal parts of the range."""
    draw, step = random.Random(seed), (largest - smallest) / count
    return [round(smallest + step * (i + draw.random())) for i in range(count)]


def _inside(script: str) -> list[str]:
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script]
