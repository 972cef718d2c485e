"""Where settings come from: flags, LORAPLEX_* variables, a YAML file; and what is said of a wrong one.

With `server/config.py`, which asks for the user's folders, the only place that reads the environment.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from server.config import Settings, SettingsError, flag
from server.other_flags import ALIASES, ALWAYS, KNOWN, REFUSED

ENV_PREFIX = "LORAPLEX_"
CONFIG_FILE = "config"  # the flag that names the YAML file, and the only one that is no field
DEFAULT_URL = "http://127.0.0.1:8000"
_OTHERS = frozenset({"LORAPLEX_CONFIG", "LORAPLEX_URL"})  # read elsewhere here
# set by Kubernetes in every pod beside a Service whose name begins as ours
_OF_A_SERVICE = re.compile(r"LORAPLEX_(.+_)?(SERVICE_(HOST|PORT.*)|PORT_\d+_.+)|LORAPLEX_.+_PORT")

logger = logging.getLogger(__name__)


def load_settings(flags: Mapping[str, object], config: Path | None = None) -> Settings:
    """The settings of this process: flags win over environment, file and defaults, in this order."""
    typed = ((name, flag(name), value) for name, value in flags.items())
    if config is None and (named := os.environ.get(ENV_PREFIX + CONFIG_FILE.upper())):
        config = Path(named)
    sources = _by_our_names(_from_file(config))
    sources |= _by_our_names(_from_environment())
    sources |= _by_our_names(typed)
    try:
        return Settings.model_validate({name: value for name, (_, value) in sources.items()})
    except ValidationError as error:
        details = error.errors(include_url=False)
        labels = {name: label for name, (label, _) in sources.items()}
        raise SettingsError("; ".join(dict.fromkeys(_line(detail, labels) for detail in details))) from None


def _by_our_names(given: Iterable[tuple[str, str, object]]) -> dict[str, tuple[str, object]]:
    """What one source says, each with its label; raises on what cannot be honoured, or is said twice."""
    found: dict[str, tuple[str, object]] = {}
    for name, label, value in given:
        if name in REFUSED:
            raise SettingsError(f"{label}: {REFUSED[name]}")
        if name in ALWAYS:
            if str(value).lower() not in ("true", "1", "yes", "on"):
                raise SettingsError(f"{label}: {ALWAYS[name]}, which cannot be turned off; leave it out")
            continue
        field = ALIASES.get(name, name)
        if field in found:
            raise SettingsError(f"{found[field][0]} and {label} are one setting; give one of them")
        found[field] = (label, value)
    return found


class ClientSettings(NamedTuple):
    """The server that a command of ours talks to."""

    url: str
    api_key: str | None


def load_client_settings(url: str | None, api_key: str | None) -> ClientSettings:
    """Where the server is and the key for it: flags win over LORAPLEX_URL and LORAPLEX_ADMIN_API_KEY or _API_KEY."""
    label = "--url" if url else "LORAPLEX_URL"
    found = url or os.environ.get("LORAPLEX_URL") or DEFAULT_URL
    if not re.match(r"https?://[^/]", found):
        raise SettingsError(f"{label}: must be like {DEFAULT_URL}, got {found!r}")
    keys = (api_key, os.environ.get("LORAPLEX_ADMIN_API_KEY"), os.environ.get("LORAPLEX_API_KEY"))
    return ClientSettings(found.rstrip("/").removesuffix("/v1"), next(filter(None, keys), None))


def _from_file(path: Path | None) -> Iterator[tuple[str, str, object]]:
    if path is None:
        return
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:  # its own words quote the file, which may hold a key
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SettingsError(
            f"--config {path}: cannot be read as YAML: line {line}: {error.problem}"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"--config {path}: cannot be read as YAML: {reason}") from None
    if not isinstance(content, dict | None):
        raise SettingsError(f"--config {path}: must hold a mapping of flags to values, such as `port: 8000`")
    for key, value in (content or {}).items():
        name = str(key).replace("-", "_")
        if name not in Settings.model_fields and name not in KNOWN:
            raise SettingsError(
                f"{key} in {path}: no such setting; the keys are the flags without their dashes"
            )
        if value is not None:
            yield name, f"{key} in {path}", value


def _from_environment() -> Iterator[tuple[str, str, object]]:
    """Of variables that are no setting only a word is said: others than us may set them."""
    names = {ENV_PREFIX + name.upper(): name for name in (*Settings.model_fields, *sorted(KNOWN))}
    for variable, value in os.environ.items():
        if not variable.startswith(ENV_PREFIX) or not value or _OF_A_SERVICE.fullmatch(variable):
            continue
        if variable == f"{ENV_PREFIX}PORT" and value.startswith("tcp://"):
            logger.warning(
                "%s=%s is Kubernetes' word of a Service called loraplex, no port to listen on",
                variable,
                value,
            )
        elif variable in names:
            yield names[variable], variable, value
        elif variable not in _OTHERS:
            close = difflib.get_close_matches(variable, names, 1)
            hint = f"; was {close[0]} meant?" if close else ""
            logger.warning("%s is no setting and changes nothing%s", variable, hint)


def _line(detail: ErrorDetails, labels: Mapping[str, str]) -> str:
    """One pydantic error as words: where the value came from, and what it must be."""
    if not detail["loc"]:
        return detail["msg"]
    name = str(detail["loc"][0])
    label = labels.get(name, flag(name))
    if detail["type"] == "missing":
        if "served_model_name" in labels:
            return f"{label} is missing; put it first: --served-model-name takes every word that follows"
        return f"{label} is missing; name the base model, for example `loraplex serve ./my-base`"
    message = detail["msg"].replace("Input should be", "must be")
    got = "" if detail["type"] in ("modules", "keys") else f", got {str(detail['input'])[:80]!r}"
    return f"{label}: {message[:1].lower()}{message[1:]}{got}"
