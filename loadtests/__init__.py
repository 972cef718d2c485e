"""Checks and loads that reach the server as its clients do: over HTTP, importing nothing of it."""
