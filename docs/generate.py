"""The pages that are made while the site is built, so that they cannot differ from the code (a hook of MkDocs).

`index.md` is README.md, `configuration.md` is the schema with the options of all methods, and `equations.md` has the
docstring of every method's module.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from rayfed.cli.methods import describe as describe_method
from rayfed.config import Experiment
from rayfed.config.describe import allowed_values, format_value, iter_fields
from rayfed.config.sweep import Sweep
from rayfed.methods import METHODS, method_class

ROOT = Path(__file__).resolve().parents[1]
UPWARD = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)[^)]*\)")
"""A link to a file in a folder above the page's: its text, and the `../` that it starts with."""


def index() -> str:
    """README.md with its links as seen from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\]\((?!docs/|\w+:)", "](../", text).replace("](docs/", "](")


def configuration() -> str:
    """Every setting with its default, the values it allows and its meaning, then the options of every method."""
    parts = [
        "# Configuration",
        "A YAML file and `key=value` overrides with dotted keys set these fields. `rayfed settings SECTION` prints the "
        "same text. A value that a field does not allow is refused before anything starts, with exit code 2.",
    ]
    section = None
    for key, field in [*iter_fields(Experiment), *iter_fields(Sweep, "sweep.")]:
        name = key.split(".")[0] if "." in key else "run"
        if name != section:
            section = name
            parts.append(f"## {name}")
        default = "none: required" if field.is_required() else f"`{format_value(field.default, quotes=False)}`"
        parts.append(f"**`{key}`** (default {default}): {allowed_values(field)}.\n{_safe(field.description or '')}")
    parts += ["## Options of objectives", "They stand in the section `objective`: see [Objectives](objectives.md)."]
    where = "They stand in the section `weighting`: see [Weights and channels](weights-and-channels.md)."
    parts += ["## Options of weightings", where]
    parts += ["## Options of topologies", "They stand in the section `topology`: see [Topologies](topologies.md)."]
    parts += ["## Options of methods", "They stand in the section `method`, beside `name`."]
    for name in METHODS:
        parts += [f"### {name}", f"```text\n{describe_method(name)}\n```"]
    return "\n\n".join(parts) + "\n"


def equations() -> str:
    """The docstring of every method's module, in the notation of methods.md."""
    parts = [
        "# Equations",
        "Each text is the docstring of `rayfed/methods/NAME.py`. [Methods](methods.md) has the notation.",
    ]
    for name in METHODS:
        docstring = inspect.getdoc(importlib.import_module(method_class(name).__module__)) or ""
        parts += [f"## {name}", f"```text\n{docstring}\n```"]
    return "\n\n".join(parts) + "\n"


PAGES = {"index.md": index, "configuration.md": configuration, "equations.md": equations}


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages to the site."""
    from mkdocs.structure.files import File

    for name, page in PAGES.items():
        files.append(File.generated(config, name, content=page()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leaves the text of a link to a file outside docs/, which the site does not have."""
    depth = page.file.src_uri.count("/")
    return UPWARD.sub(lambda link: link[1] if link[2].count("/") > depth else link[0], markdown)


def _safe(text: str) -> str:
    """The text with the signs escaped that Markdown would read outside of code: `lr * B`."""
    return "".join(
        part if part.startswith("`") else re.sub(r"([*_<\[])", r"\\\1", part) for part in re.split(r"(`[^`]*`)", text)
    )
