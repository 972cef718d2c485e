"""The `loraplex` command: flags in, exit code out. Answers `--help` without importing torch or transformers.

Knows nothing of how a server runs (`server/process.py`), nor of what is asked of one (`server/adapters_command.py`).
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

from server.adapters_command import add_adapters_commands, run_adapters
from server.config import Settings, SettingsError, flag
from server.config_sources import CONFIG_FILE, load_settings
from server.config_values import GIB
from server.other_flags import ALIASES, ALWAYS, REFUSED
from server.version import VERSION

USAGE = 2  # exit code for a command that cannot be carried out as typed


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; see `{self.prog} --help`", file=sys.stderr)
        raise SystemExit(USAGE)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; the exit code is 0 for done, 1 for failed, 2 for a wrong command."""
    parser = build_parser()
    known, unknown = parser.parse_known_args(arguments)
    values = vars(known)
    command, asked = values.pop("command"), values.pop("parser")
    if unknown:
        asked.error(_unknown(unknown[0], asked))
    match command:
        case "version":
            print(f"loraplex {VERSION}")
            return 0
        case "adapters":
            return run_adapters(values)
        case _:
            return _serve(values)


def build_parser() -> argparse.ArgumentParser:
    """The command line, made from the fields of `Settings`."""
    parser = _Parser(prog="loraplex", description="Many LoRA adapters on one quantized base model.")
    parser.add_argument("--version", action="version", version=f"loraplex {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)
    serve = commands.add_parser(
        "serve",
        help="serve a base model and its adapters over HTTP",
        description="Serve a base model and its adapters over HTTP. Every flag may also be given as an "
        "environment variable (--port as LORAPLEX_PORT) or as a key of the YAML file named by --config.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    serve.add_argument(f"--{CONFIG_FILE}", type=Path, metavar="FILE", help="YAML file with further settings")
    for name, field in Settings.model_fields.items():
        text = (field.description or "") + _default(name, field.default)
        kind = _kind(name, field.annotation) | ({"nargs": "?"} if name == "model" else {})
        serve.add_argument(*_spelling(name), help=text.replace("%", "%%"), **kind)
    others = serve.add_argument_group("names that vLLM and SGLang have for these")
    for name, ours in ALIASES.items():
        others.add_argument(
            flag(name), help=f"as {flag(ours)}", **_kind(ours, Settings.model_fields[ours].annotation)
        )
    for name, why in ALWAYS.items():
        others.add_argument(flag(name), action=argparse.BooleanOptionalAction, help=f"accepted: {why}")
    serve.set_defaults(parser=serve)
    add_adapters_commands(
        commands.add_parser(
            "adapters",
            help="list, upload, roll back and remove the adapters of a running server",
            description="List, upload, roll back and remove the adapters of a running server.",
        )
    )
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(parser=version)
    return parser


def _spelling(name: str) -> list[str]:
    if name == "model":
        return [name]
    return ["-q", flag(name)] if name == "quantization" else [flag(name)]


_SEVERAL = {"lora_modules": "NAME=PATH", "served_model_name": "NAME"}
_REPEATED = {"api_key", "admin_api_key"}


def _kind(name: str, annotation: Any) -> dict[str, Any]:
    """How argparse should take one field; values stay text here, and `Settings` reads them."""
    if name == "model":
        return {"metavar": "MODEL"}
    if annotation is bool:
        return {"action": argparse.BooleanOptionalAction}
    if name in _REPEATED:
        return {"action": "append", "metavar": "KEY"}
    if name in _SEVERAL:
        return {"action": "extend", "nargs": "+", "metavar": _SEVERAL[name]}
    options = [option for option in get_args(annotation) if isinstance(option, str)]
    metavar = "{" + ",".join(options) + "}" if options else name.rpartition("_")[2].upper()
    return {"metavar": metavar}


def _default(name: str, value: object) -> str:
    if not isinstance(value, str | int | float) or value is False or value == "":
        return ""
    shown = f"{int(value) // GIB}GiB" if name.endswith("_bytes") else value
    return f" (default {shown})"


def _unknown(argument: str, parser: argparse.ArgumentParser) -> str:
    name = argument.partition("=")[0]
    if parser.prog.endswith(" serve") and (why := REFUSED.get(name.lstrip("-").replace("-", "_"))):
        return f"{name}: {why}"
    flags = [name for name in parser._option_string_actions if name.startswith("--")]
    close = difflib.get_close_matches(name, flags, n=1)
    return f"unknown argument {name}" + (f", did you mean {close[0]}?" if close else "")


def _take_model_from_modules(values: dict[str, Any]) -> None:
    """In `--lora-modules a=/x ./my-base` the flag has taken the base as well; it is the one that is no module."""
    for name in ("lora_modules", "lora_paths"):
        modules = values.get(name, [])
        bases = [text for text in modules if "=" not in text and not text.startswith("{")]
        if len(bases) == 1 and not {"model", "model_path"} & set(values):
            values["model"] = bases[0]
            modules.remove(bases[0])


def _serve(values: dict[str, Any]) -> int:
    config = values.pop(CONFIG_FILE, None)
    _take_model_from_modules(values)
    try:
        settings = load_settings(values, config)
    except SettingsError as error:
        print(f"loraplex serve: {error}", file=sys.stderr)
        return USAGE
    from server.process import run

    return run(settings)


if __name__ == "__main__":
    sys.exit(main())
