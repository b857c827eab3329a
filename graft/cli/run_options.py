"""The command line of `lora.py`, made from the declaration in `graft.training.options`."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from graft.cli.command import Parser
from graft.storage.yaml_file import read_yaml_file
from graft.training.options import GROUPS, Options, flag, value_type

_METAVARS = {int: "N", float: "X", str: "TEXT"}


def options_parser(description: str, names: Sequence[str] | None = None) -> Parser:
    """A parser of the options; what is not given is left out of its result.

    Args:
        description: of the command.
        names: the options that the command has; all by default.
    """
    parser = Parser(description=description, argument_default=argparse.SUPPRESS)
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML file of options; the command line overrides it (default: no file)",
    )
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    for field in dataclasses.fields(Options):
        if names is None or field.name in names:
            _add(groups[field.metadata["group"]], field)
    return parser


def parse_options(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The options given on a command line, and those of its `--config` file; no defaults.

    Raises:
        InputError: the file cannot be read.
    """
    given = vars(parser.parse_args(argv))
    file = given.pop("config", None)
    return {**(read_yaml_file(Path(file)) if file else {}), **given}


def _add(group: Any, field: "dataclasses.Field[Any]") -> None:
    about, kind = field.metadata, value_type(field)
    former = [flag(about["formerly"])] if about["formerly"] else []
    flags = (*about["flags"], flag(field.name))
    if kind is bool:
        settings: dict[str, Any] = {"action": "store_true"}
        text = about["help"]
    else:
        metavar = None if about["choices"] else about["metavar"] or _METAVARS[kind]
        settings = {"type": kind, "metavar": metavar, "choices": about["choices"]}
        text = about["help"]
        if field.default is not None and "(default" not in text:
            text += f" (default: {field.default})"
    group.add_argument(*flags, dest=field.name, help=text, **settings)
    if former:
        group.add_argument(*former, dest=field.name, help=argparse.SUPPRESS, **settings)
