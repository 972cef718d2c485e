"""`loraplex adapters`: lists, uploads, rolls back and removes the adapters of a running server, for people and scripts.

Its arguments, and what it prints. Knows nothing of HTTP: `server/adapters_client.py` speaks it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.errors import AdapterError
from server.config import SettingsError
from server.config_sources import DEFAULT_URL, load_client_settings
from server.config_values import size_text

if TYPE_CHECKING:
    from adapters.packing import Packed
    from server.adapters_client import AdaptersClient

FAILED, USAGE, INTERRUPTED = 1, 2, 130
SHORT = 12  # characters of a generation that tables show
WHOLE = 64  # characters of one that is not shortened
_ARCHIVE_ENDS = (".tar.gz", ".tgz", ".tar", ".zip")

Json = dict[str, Any]


def add_adapters_commands(parser: argparse.ArgumentParser) -> None:
    """The commands under `loraplex adapters`."""
    commands = parser.add_subparsers(
        dest="adapters_command", required=True, metavar="COMMAND", parser_class=type(parser)
    )

    def command(
        run: Callable[..., None], name: str, what: str, *, changes: bool = False
    ) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = commands.add_parser(
            name, help=what, description=what[0].upper() + what[1:] + ".", allow_abbrev=False
        )
        made.add_argument("--url", help=f"the server (default LORAPLEX_URL, else {DEFAULT_URL})")
        made.add_argument(
            "--api-key", metavar="KEY", help="default LORAPLEX_ADMIN_API_KEY, else LORAPLEX_API_KEY"
        )
        if changes:
            made.add_argument(
                "--if-match",
                metavar="GENERATION",
                help="only if the name is at this generation; its first characters do",
            )
        made.set_defaults(run=run, parser=made)
        return made

    put = command(_put, "put", "upload an adapter, or replace one", changes=True)
    put.add_argument("name", nargs="?", metavar="NAME", help="if left out, as the folder or file is called")
    put.add_argument(
        "path",
        type=Path,
        metavar="PATH",
        help="a folder that peft's save_pretrained wrote, or its zip or tar",
    )
    listed = command(_list, "list", "list every adapter")
    shown = command(_show, "show", "show one adapter, and what is wrong with it")
    versions = command(_versions, "versions", "list the versions of an adapter that a rollback can return to")
    back = command(_rollback, "rollback", "return a name to an earlier version", changes=True)
    removed = command(_rm, "rm", "remove a name; requests that run with it end as they began", changes=True)
    for made in (shown, versions, back, removed):
        made.add_argument("name", metavar="NAME")
    back.add_argument("to", metavar="TO", help="a revision, or the first characters of a generation")
    for made in (put, listed, shown, versions, back):
        made.add_argument(
            "--json", action="store_true", dest="as_json", help="print what the server answered"
        )


def run_adapters(values: dict[str, Any]) -> int:
    """Carry out one command; the exit code is 0 for done, 1 for refused, 2 for a wrong command."""
    prog = f"loraplex adapters {values.pop('adapters_command')}"
    run = values.pop("run")
    try:
        settings = load_client_settings(values.pop("url"), values.pop("api_key"))
    except SettingsError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return USAGE
    from server.adapters_client import AdaptersClient, ClientError  # imports httpx

    try:
        with AdaptersClient(settings) as client:
            run(client, **values)
            sys.stdout.flush()
    except (ClientError, AdapterError) as error:
        print("\n  ".join([f"{prog}: {error.message}", *map(str, error.findings)]), file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # what is printed goes to a `head` that has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return 0


def _put(client: AdaptersClient, name: str | None, path: Path, if_match: str | None, as_json: bool) -> None:
    from adapters.packing import pack  # imports the readers of archives

    body = pack(path)
    name = name or _name_of(path)
    if_match = _whole(client, name, if_match)
    with _with_progress(body, name) as chunks:
        moved, adapter = client.put(name, chunks, len(body), if_match)
    if as_json:
        _print_json(adapter)
        return
    where = f"revision {adapter['revision']}, generation {adapter['generation'][:SHORT]}"
    if moved:
        print(f"{name} is ready: {where}, rank {adapter['rank']}, {size_text(adapter['bytes'])}")
    else:
        print(f"{name} had this content already: {where}")


def _list(client: AdaptersClient, as_json: bool) -> None:
    body = client.list()
    if as_json:
        _print_json(body)
    elif not body["data"]:
        print("no adapters yet; `loraplex adapters put FOLDER` uploads one", file=sys.stderr)
    else:
        head = ("NAME", "STATE", "RANK", "MODULES", "SIZE", "REVISION", "GENERATION", "REFERENCES")
        _print_table(head, [_row(adapter) for adapter in body["data"]], right={2, 4, 5, 7})


def _show(client: AdaptersClient, name: str, as_json: bool) -> None:
    from server.adapters_client import finding_line  # imports httpx

    adapter = client.get(name)
    if as_json:
        _print_json(adapter)
        return
    running = adapter["references"]
    lines = {
        "name": adapter["id"],
        "state": adapter["state"],
        "generation": adapter["generation"],
        "revision": adapter["revision"],
        "rank": adapter["rank"],
        "modules": ", ".join(adapter["modules"]),
        "size": size_text(adapter["bytes"]),
        "trained on": adapter["base_model"] or "not said",
        "created": _time(adapter["created"]),
        "updated": _time(adapter["updated"]),
        "in use by": f"{running} running request{'s' if running != 1 else ''}",
    }
    for key, value in lines.items():
        print(f"{key:<11} {value}")
    for finding in adapter["findings"]:
        print(f"{'finding':<11} {finding_line(finding)}")


def _versions(client: AdaptersClient, name: str, as_json: bool) -> None:
    body = client.versions(name)
    if as_json:
        _print_json(body)
        return
    rows = [
        (str(v["revision"]), v["generation"][:SHORT], _time(v["created"]), "current" if v["current"] else "")
        for v in body["data"]
    ]
    _print_table(("REVISION", "GENERATION", "SINCE", ""), rows, right={0})


def _rollback(client: AdaptersClient, name: str, to: str, if_match: str | None, as_json: bool) -> None:
    if_match = _whole(client, name, if_match)
    adapter = client.rollback(name, _version(client, name, to), if_match)
    if as_json:
        _print_json(adapter)
    else:
        print(f"{name} is at revision {adapter['revision']}, generation {adapter['generation'][:SHORT]}")


def _rm(client: AdaptersClient, name: str, if_match: str | None) -> None:
    client.delete(name, _whole(client, name, if_match))
    print(f"{name} is removed")


def _name_of(path: Path) -> str:
    """What a folder or an archive is called."""
    name = path.resolve().name
    end = next((end for end in _ARCHIVE_ENDS if path.is_file() and name.lower().endswith(end)), "")
    return name.removesuffix(name[len(name) - len(end) :])


def _whole(client: AdaptersClient, name: str, if_match: str | None) -> str | None:
    """A generation as the server compares it, from the beginning of one as the tables show it."""
    if if_match is None or len(if_match) >= WHOLE:
        return if_match
    present: str = client.get(name)["generation"]
    return present if present.startswith(if_match.lower()) else if_match


def _version(client: AdaptersClient, name: str, to: str) -> int | str:
    """A revision, or a generation from its beginning if that names one version."""
    if re.fullmatch(r"[0-9]{1,9}", to):
        return int(to)
    known = {version["generation"] for version in client.versions(name)["data"]}
    matching = [generation for generation in known if generation.startswith(to.lower())]
    return matching[0] if len(matching) == 1 else to


@contextmanager
def _with_progress(body: Packed, name: str) -> Iterator[Iterator[bytes]]:
    """The body's chunks as they are; a bar on a terminal, which says so when all are sent and being checked."""
    from tqdm import tqdm

    with tqdm(
        desc=name, total=len(body), unit="B", unit_scale=True, unit_divisor=1024, disable=None, leave=False
    ) as bar:

        def counted() -> Iterator[bytes]:
            for chunk in body:
                yield chunk
                bar.update(len(chunk))
            bar.set_description(f"{name}: checking")

        yield counted()


def _row(adapter: Json) -> tuple[str, ...]:
    return (
        adapter["id"],
        adapter["state"],
        str(adapter["rank"]),
        ",".join(module.removesuffix("_proj") for module in adapter["modules"]),
        size_text(adapter["bytes"]),
        str(adapter["revision"]),
        adapter["generation"][:SHORT],
        str(adapter["references"]),
    )


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], right: set[int]) -> None:
    """Columns as wide as they need to be; those in `right` are numbers."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        cells = [
            cell.rjust(width) if place in right else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def _print_json(body: Json) -> None:
    print(json.dumps(body, indent=2))


def _time(seconds: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
