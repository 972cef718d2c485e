"""Adapters that a start is told of (`--lora-modules`), beside those that the store has. Knows nothing of the base."""

from __future__ import annotations

import logging

from adapters.errors import AdapterError
from adapters.registry import Registry
from adapters.sources import folder_files
from adapters.store import hash_folder
from server.config import Settings, SettingsError

logger = logging.getLogger(__name__)


def check_modules(settings: Settings) -> None:
    """Refuse `--lora-modules` that lead nowhere; what is in them can be judged with the base at hand only."""
    for module in settings.lora_modules:
        given = f"--lora-modules {module.name}={module.path}"
        if module.path.is_file():
            raise SettingsError(
                f"{given}: is a file, and a folder is asked for; unpack it, or put it once the server is ready"
            )
        if not module.path.is_dir():
            raise SettingsError(
                f"{given}: there is no such folder; an adapter of a model hub has to be downloaded first"
            )


def register_modules(settings: Settings, registry: Registry) -> None:
    """Give the names of `--lora-modules` their folders' content. What a client has made of a name since then stands."""
    for name, folder, _ in settings.lora_modules:
        try:
            folder_files(folder)
            entry = registry.entry(name) if name in registry else None
            if entry and entry.mover == "client" and entry.generation != (asked := hash_folder(folder)):
                logger.warning(
                    "--lora-modules is not followed, since a client has moved the name; put the folder's adapter to "
                    "have it: name=%s generation=%s folder_generation=%s",
                    *(name, entry.generation, asked),
                )
            else:
                registry.put_folder(name, folder, mover="start")
        except AdapterError as error:
            raise SettingsError(f"--lora-modules {name}={folder}: {error}") from error


def warn_of_hidden(settings: Settings, registry: Registry) -> None:
    """Name stored adapters that cannot be asked for as `model`, since the base has come to have their name."""
    for name in sorted(settings.base_names):
        if name in registry:
            logger.warning(
                "the base has the name of a stored adapter, which `model` does not reach any more; choose another "
                "--served-model-name, or put the adapter under another name: name=%s",
                name,
            )
