"""Changed files: one seeded change to one file of a run directory, as a bad disk or a careless hand makes it."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

KINDS = ("bit", "digit", "cut", "removed", "emptied", "longer", "swapped", "link", "folder")


def corrupt(folder: Path, seed: int) -> str:
    """Changes one file below ``folder``; returns what was changed, as `kind name`."""
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path, kind = draw.choice(files), draw.choice(KINDS)
    data = bytearray(path.read_bytes())
    if kind == "digit" and (places := [match.start() for match in re.finditer(rb"\d", data)]):
        place = draw.choice(places)
        data[place] = ord(draw.choice([digit for digit in "0123456789" if ord(digit) != data[place]]))
        path.write_bytes(data)
    elif kind == "cut":
        path.write_bytes(data[: draw.randrange(len(data) or 1)])
    elif kind == "removed":
        path.unlink()
    elif kind == "emptied":
        path.write_bytes(b"")
    elif kind == "longer":
        path.write_bytes(data + draw.randbytes(draw.randint(1, 100)))
    elif kind == "swapped":
        shutil.copyfile(draw.choice(files), folder / ".swap")
        (folder / ".swap").replace(path)
    elif kind == "link":
        path.unlink()
        path.symlink_to(draw.choice(["/dev/zero", str(folder / "nowhere"), str(draw.choice(files))]))
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    else:
        kind = "bit"
        bit = draw.randrange(8 * len(data) or 1)
        if data:
            data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
    return f"{kind} {path.relative_to(folder)}"
