"""YAML in and out, with limits that hold before anything is built from the text.

A config may be an attack or an accident: a file of gigabytes, aliases that multiply, brackets without an end. Reading
one takes at most about two seconds and a few megabytes.
"""

from __future__ import annotations

import re
import stat
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import ConstructorError

from rayfed.errors import UserError, allowed, first_line

MOST_BYTES = 1_000_000  # of a file, or of the value of an override
MOST_VALUES = 50_000  # keys and values, those that aliases repeat included
MOST_LEVELS = 32  # of sections and lists within each other
_TAG = "tag:yaml.org,2002:"
_PLAIN = [  # the types of a plain scalar (one without quotes): the first pattern that matches counts, else a string
    (_TAG + "null", re.compile(r"(~|null|Null|NULL|)\Z")),
    (_TAG + "bool", re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")),
    (_TAG + "int", re.compile(r"[-+]?(0|[1-9][0-9_]*)\Z")),
    (_TAG + "float", re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?\Z")),
    (_TAG + "float", re.compile(r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+\Z")),
    (_TAG + "float", re.compile(r"[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")),
    (_TAG + "merge", re.compile(r"<<\Z")),
]
_KINDS = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    """YAML, with these changes to YAML 1.1: 1e-3 is a number; off, 010, 12:30 and dates are strings.

    (YAML 1.1 reads 1e-3 as a string, off as a boolean, 010 as an octal number, 12:30 as a number to base 60.) A key
    given twice is refused, and so is a list or a mapping as a key. So are tags of values that no setting has, such as
    `!!python/object` and `!!set`, and texts beyond the limits of this module.
    """

    yaml_implicit_resolvers = {None: _PLAIN}  # noqa: RUF012 - declared so by PyYAML
    yaml_constructors = {  # noqa: RUF012
        tag: yaml.SafeLoader.yaml_constructors[tag] for tag in (None, *(_TAG + kind for kind in _KINDS))
    }

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = self._values = 0
        self._sizes: dict[int, int] = {}  # values in the lists and mappings read so far, by their id

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Counts values while they are read, so that no limit is passed before it is noticed."""
        mark = self.peek_event().start_mark
        if self._level > MOST_LEVELS:
            raise ConstructorError(None, None, f"it is nested more than {MOST_LEVELS} levels deep", mark)
        before = self._values
        self._level += 1
        self._values += 1
        alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        self._level -= 1
        if alias:
            if id(node) not in self._sizes:
                raise ConstructorError(None, None, "an alias stands within what it repeats", mark)
            self._values += self._sizes[id(node)]
        self._sizes.setdefault(id(node), self._values - before)
        if self._values > MOST_VALUES:
            raise ConstructorError(None, None, f"it has more than {MOST_VALUES} values", mark)
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compares keys as they are written: later, those that `<<` brings in are among them."""
        node = super().compose_mapping_node(anchor)
        lines: dict[Any, int] = {}
        for key_node, _ in node.value:
            mark = key_node.start_mark
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConstructorError(None, None, "a key is a word, not a list or a mapping", mark)
            key = key_node.value if key_node.tag == _TAG + "merge" else self.construct_object(key_node)
            line = mark.line + 1
            if key in lines:
                where = f"in line {line}" if line == lines[key] else f"in lines {lines[key]} and {line}"
                raise ConstructorError(None, None, f"key {key!r} is given twice, {where}", mark)
            lines[key] = line
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes every string that `_Loader` or a loader of YAML 1.1 would read as another type without quotes."""

    yaml_implicit_resolvers = {**yaml.SafeDumper.yaml_implicit_resolvers, None: _PLAIN}  # noqa: RUF012

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Double quotes escape Unicode's own line ends. Without, a loader would fold them like those of the file."""
        quoted = any(end in text for end in "\x85\u2028\u2029")
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


_Dumper.add_representer(str, _Dumper.represent_text)


def read_text(path: Path) -> str:
    """The text of a config file. UserError where there is none, where it is not UTF-8, and where it is too long."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe or a device may have no end
            raise OSError("it is a folder, a pipe or a device")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise OSError(f"it has more than {MOST_BYTES} bytes")
        return content.decode("utf-8")
    except FileNotFoundError:
        raise allowed("config", str(path), "there is no such file") from None
    except (OSError, ValueError) as error:  # no permission; not UTF-8
        raise allowed("config", str(path), f"it cannot be read as text ({first_line(error)})") from None


def parse(text: str, where: str) -> Any:
    """The value of the YAML ``text``. UserError in one line that begins with ``where``."""
    try:
        if len(text) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES} characters")
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        reason = str(error)
    except (ValueError, LookupError, OverflowError):  # `!!int one`, `!!bool maybe`, an integer of thousands of digits
        reason = "a value does not match its tag or its type"
    except RecursionError:
        reason = "it is nested too deeply"
    raise UserError(f"{where}: not valid YAML: {' '.join(reason.split())}")


def dump_settings(settings: dict[str, Any]) -> str:
    """A mapping as YAML. `read_settings` reads it back to the same mapping."""
    return yaml.dump(settings, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
