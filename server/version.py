"""The version, in one place: `loraplex version`, `/version` and pyproject.toml read it here."""

VERSION = "2026.11.0"
