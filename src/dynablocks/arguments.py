"""What is given on the command line and in configuration files: shorthands, parsers, values read as they look."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from dynablocks.errors import UNREADABLE, InvalidArgument
from dynablocks.files import expanded
from dynablocks.progress import error_console, print_line

SHORTHANDS = {
    "--model": "--model.name",
    "--lift": "--model.lift",
    "--data": "--data.name",
    "--data-dir": "--data.dir",
    "--epochs": "--training.epochs",
    "--max-minutes": "--training.max_minutes",
    "--seed": "--training.seed",
    "--device": "--training.device",
}

_PRESET_FIRST = (
    "The defaults above are those of the Python classes; a preset sets many of them first: --print_config prints what "
    "holds."
)
DEFAULTS = {
    "run": _PRESET_FIRST,
    "train": _PRESET_FIRST,
    "attack": "The settings of the run come before the defaults above: --print_config prints what holds.",
}
"""What the help of a command says where other values than the defaults that it shows hold."""


def shorthands_of(command: str) -> dict[str, str]:
    """The shorthands of a command: of settings that it has."""
    if command in ("run", "train"):
        return SHORTHANDS
    groups = {"explain": ("--model.",), "fit": (), "rollout": (), "list": ()}.get(command, ("--data.dir",))
    return {short: full for short, full in SHORTHANDS.items() if full.startswith(groups)}


def expand(arguments: Sequence[str], command: str) -> list[str]:
    """Full names for shorthands, as ``--model.name X`` for ``--model X``; files first: every flag overrides them."""
    shorthands = shorthands_of(command)
    files: list[str] = []
    flags: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag == "--config":
            files += [argument] if equals else [argument, *itertools.islice(rest, 1)]
        else:
            flags.append(shorthands.get(flag, flag) + equals + value)
    return files + flags


def make_parser(command: str, summary: str, examples: str | None = None) -> Any:
    """The parser of a command; its help ends with ``examples``, line for line, or shorthands and :data:`DEFAULTS`."""
    from jsonargparse import ArgumentParser, DefaultHelpFormatter
    from jsonargparse.typing import Path_fr

    texts: dict[str, str] = {}

    def text_of(file: str) -> str:
        """The text of a ``--config`` file, which is read once: a pipe gives it once."""
        if file not in texts:
            texts[file] = _text(file, "--config")
        return texts[file]

    class Verbatim(DefaultHelpFormatter):
        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return "\n".join(indent + line for line in text.splitlines())

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise InvalidArgument(_one_sentence(str(message), command)) from ex

        def format_help(self, *arguments: Any, **options: Any) -> str:
            """Without the files that jsonargparse offers for a group where its flag is a shorthand here."""
            for short in shorthands_of(command).keys() & self._option_string_actions.keys():
                self._option_string_actions[short].help = argparse.SUPPRESS
            return str(super().format_help(*arguments, **options))

        def settings(self, file: str) -> dict[str, Any]:
            """What a ``--config`` file holds, as :func:`read_settings` has it."""
            return _settings(text_of(file), f"--config {file}")

        def parse_path(self, path: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
            """The text that was checked: UTF-8, and not in the encoding of this machine."""
            with Path_fr(path).relative_path_context():
                return self.parse_string(text_of(str(path)), str(path), *arguments, **options)

        def parse_args(  # type: ignore[override]
            self,
            args: Sequence[str] | None = None,
            namespace: Any = None,
            env: bool | None = None,
            defaults: bool = True,
            **kwargs: Any,
        ) -> Any:
            given = list(args or ())
            for file in values_of(given, "--config"):
                if os.path.exists(expanded(file)) and not os.path.isdir(expanded(file)):
                    self.settings(file)
            _require_plain_numbers(self._option_string_actions, given)
            try:
                return _at_home(super().parse_args(args, namespace, env, defaults, **kwargs))
            except OverflowError as error:
                raise InvalidArgument(f"a number is too large ({error}); give a smaller one.") from error

    shorthands = ", ".join(f"{short} = {full}" for short, full in shorthands_of(command).items())
    notes = [f"shorthands: {shorthands}."] if shorthands else []
    notes += [DEFAULTS[command]] if command in DEFAULTS else []
    return Parser(
        prog=f"dynablocks {command}",
        description=summary,
        epilog=examples or " ".join(notes) or None,
        formatter_class=Verbatim if examples else DefaultHelpFormatter,
        exit_on_error=True,
        default_env=False,
        allow_abbrev=False,
    )


def _at_home(options: Any) -> Any:
    """The options with the ``~`` of every path replaced: a shell leaves that of --out=~/a, and none sees a file's."""
    for name, value in list(options.items()):
        if isinstance(value, Path):
            options[name] = expanded(value)
    return options


WORDS = {
    "float": "a number",
    "int": "a whole number",
    "bool": "true or false",
    "tuple": "a list such as [1,2]",
    "str": "text, in quotes in YAML,",
}


def _one_sentence(message: str, command: str) -> str:
    """jsonargparse's message without its history of types: which setting, what came, what is needed."""
    key = re.search(r'Parser key "([^"]+)"', message)
    value = re.search(r"(?:Got|Given) value: (.*)", message)
    wanted = [WORDS.get(kind, kind) for kind in re.findall(r"Expected an? <class '(\w+)'>", message)]
    if key and value and wanted:
        text = f"--{key[1]} is {value[1]}; {' or '.join(w for w in wanted if w != 'NoneType')} is needed"
    else:
        text = message.strip().splitlines()[-1].strip(" -")
    return f"{text.rstrip('.')}; see dynablocks {command} --help."


def values_of(arguments: Sequence[str], flag: str) -> list[str]:
    """All values of a flag, as ``--flag value`` or ``--flag=value``.

    Example:
        >>> values_of(["--out", "a", "--seed", "1", "--out=b"], "--out")
        ['a', 'b']
    """
    found = []
    for i, argument in enumerate(arguments):
        if argument == flag and i + 1 < len(arguments):
            found.append(arguments[i + 1])
        elif argument.startswith(flag + "="):
            found.append(argument.partition("=")[2])
    return found


def joined_values(arguments: Sequence[str], flag: str) -> list[str]:
    """``--weights -1,1`` as one word, since -1,1 would be taken for an option.

    Example:
        >>> joined_values(["--weights", "-1,1", "--odd"], "--weights")
        ['--weights=-1,1', '--odd']
    """
    words = list(arguments)
    for place in range(len(words) - 2, -1, -1):
        if words[place] == flag and re.match(r"-[\d.]", words[place + 1]):
            words[place : place + 2] = [f"{flag}={words[place + 1]}"]
    return words


ODD_NUMBER = re.compile(r"(?<![\w.+-])[-+]?(?:\d[\d_]*(?::[0-5]?\d)+(?:\.\d*)?|0[\d_]+)(?![\w.:])")
"""What YAML 1.1 takes for another number than it looks: 1:30 to the base of 60, 010 to that of 8."""
LONG_NUMBER = re.compile(r"[-+]?\d[\d_]{308,}")


def _fault(number: str) -> str:
    """What is wrong with a number that one of the two matches."""
    if LONG_NUMBER.search(number):
        return "a number has more than 308 digits; give a smaller one."
    return f"{number} is no plain number: YAML reads 1:30 as 90 and 010 as 8; write it in digits alone, text in quotes."


def _require_plain_numbers(options: dict[str, argparse.Action], arguments: Sequence[str]) -> None:
    """Refuse numbers that jsonargparse, which reads values as YAML 1.1, would take for others.

    Raises:
        InvalidArgument: naming the flag.
    """
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        action = options.get(flag)
        if action is None or action.nargs == 0 or flag == "--config":
            continue
        kind = getattr(action, "_typehint", None)
        if {str, Path} & {kind, *get_args(kind)}:
            continue
        text = value if equals else " ".join(arguments[i + 1 : i + 2])
        if kind is None and os.path.isfile(text):
            read_settings(text, flag)  # of a group, such as --training FILE
            continue
        odd = ODD_NUMBER.search(text) or LONG_NUMBER.search(text)
        if odd is not None:
            raise InvalidArgument(f"{flag}: {_fault(odd[0])}")


def read_settings(file: str, flag: str = "--config") -> dict[str, Any]:
    """The content of a configuration file, with the groups that decide the defaults.

    Raises:
        InvalidArgument: it is not there, not YAML, holds no settings, or a number that is none to everybody.
    """
    return _settings(_text(file, flag), f"{flag} {file}")


def _text(file: str, flag: str) -> str:
    """The text of a configuration file: UTF-8, with or without a byte order mark."""
    place = expanded(file)
    try:
        return place.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InvalidArgument(f"{flag} {file} does not exist; give a YAML file, see --print_config.") from error
    except (OSError, ValueError) as error:
        raise InvalidArgument(f"{flag} {file} is not readable YAML; write one with --print_config.") from error


def _settings(text: str, where: str) -> dict[str, Any]:
    """The content of a configuration file ``where``, of that text; a full name, as model.name, counts in its group."""
    import yaml

    try:
        content = yaml.safe_load(text)
        scalars = [event for event in yaml.parse(text, Loader=yaml.SafeLoader) if isinstance(event, yaml.ScalarEvent)]
        document = yaml.compose(text, Loader=yaml.SafeLoader)
    except (*UNREADABLE, yaml.YAMLError) as error:
        raise InvalidArgument(f"{where} is not readable YAML; write one with --print_config.") from error
    for scalar in scalars:
        plain = scalar.style is None and scalar.tag is None
        if plain and (ODD_NUMBER.fullmatch(scalar.value) or LONG_NUMBER.fullmatch(scalar.value)):
            raise InvalidArgument(f"{where}: {_fault(scalar.value)}")
    if not isinstance(content, dict):
        raise InvalidArgument(f"{where} holds no settings; write one with --print_config.")
    _require_each_once(document, where)
    groups = {name: content.get(name) or {} for name in ("data", "model")}
    if not all(isinstance(group, dict) for group in groups.values()):
        raise InvalidArgument(f"{where}: model and data are groups of settings; see --print_config.")
    for full, value in content.items():
        group, dot, name = str(full).partition(".")
        if dot and group in groups:
            groups[group] = groups[group] | {name: value}
    return content | groups


def _require_each_once(document: Any, where: str) -> None:
    """Refuse a setting or a group that stands twice, of which the last alone would count.

    A group stands twice, too, where full names of its settings stand beside it.

    Raises:
        InvalidArgument: naming what stands twice.
    """
    import yaml

    groups = [(f"{key.value}.", value) for key, value in document.value if isinstance(value, yaml.MappingNode)]
    for prefix, group in [("", document), *groups]:
        keys = [key.value for key, _ in group.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        of_full_names = {key.partition(".")[0] for key in keys if "." in key}
        for k, key in enumerate(keys):
            if key in keys[:k] or key in of_full_names:
                raise InvalidArgument(f"{where}: {prefix}{key} stands twice, and one may be lost; write it once.")


def say(sentence: str) -> None:
    """Print a sentence on standard error, where everything goes that is not a result."""
    print_line(error_console(), sentence)
