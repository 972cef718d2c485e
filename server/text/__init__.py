"""Between ids and text."""
