"""What a shell suggests for the words of a command line: configs, methods, benchmarks, settings and folders.

Each function has the signature that Click asks for: (context, parameter, the word so far).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from click import Context, Parameter
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

Completer = Callable[[Context, Parameter, str], list[CompletionItem[str]]]


@add_completion_class
class _Bash(BashComplete):
    """Bash puts no space behind the `=` of a setting: its value follows."""

    source_template = BashComplete.source_template.replace(
        "    return 0\n", "    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace\n    return 0\n"
    )


def configs(context: Context, parameter: Parameter, word: str) -> list[CompletionItem[str]]:
    """The configs that come with rayfed; where none starts with ``word``, files."""
    return config_names(context, parameter, word) or [CompletionItem(word, type="file")]


def config_names(context: Context, parameter: Parameter, word: str) -> list[CompletionItem[str]]:
    """The configs that come with rayfed, each with its summary."""
    from rayfed.config.shipped import shipped, summary

    return [CompletionItem(name, help=summary(path)) for name, path in shipped().items() if name.startswith(word)]


def overrides(context: Context, parameter: Parameter, word: str) -> list[CompletionItem[str]]:
    """Every setting as `key=`. Those of a sweep too, for the commands that take a sweep."""
    return _starting(word, (f"{key}=" for key in _keys(sweep=context.info_name in ("sweep", "submit"))))


def settings(context: Context, parameter: Parameter, word: str) -> list[CompletionItem[str]]:
    """Sections and settings."""
    keys = list(_keys(sweep=True))
    sections = {key.rpartition(".")[0] for key in keys} - {""}
    return _starting(word, [*sorted(sections), *keys])


def methods(context: Context, parameter: Parameter, word: str) -> list[CompletionItem[str]]:
    """The names of the methods."""
    from rayfed.plugins import member_names

    return _starting(word, member_names("rayfed.methods"))


def benchmarks(context: Context, parameter: Parameter, word: str) -> list[CompletionItem[str]]:
    """The names of the benchmarks."""
    from rayfed.bench import BENCHMARKS

    return _starting(word, BENCHMARKS)


def folders(context: Context, parameter: Parameter, word: str) -> list[CompletionItem[str]]:
    """Folders."""
    return [CompletionItem(word, type="dir")]


def files(context: Context, parameter: Parameter, word: str) -> list[CompletionItem[str]]:
    """Files."""
    return [CompletionItem(word, type="file")]


def _keys(sweep: bool) -> Iterable[str]:
    from rayfed.config import Experiment
    from rayfed.config.describe import iter_fields
    from rayfed.config.sweep import Sweep

    yield from (key for key, _ in iter_fields(Experiment))
    if sweep:
        yield from (key for key, _ in iter_fields(Sweep, "sweep."))


def _starting(word: str, known: Iterable[str]) -> list[CompletionItem[str]]:
    return [CompletionItem(one) for one in known if one.startswith(word)]
