"""A multipart form as it arrives: bytes in, parts and their bytes out. Holds no more than it was just given.

Knows nothing of what the parts are, or of where their bytes go.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from server.errors import InvalidRequestError

_ENCODED = re.compile(rb";\s*filename\*=([^;\s]*)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Part:
    """The beginning of a part: its field's name, and the file's if it is one."""

    name: str
    filename: str | None


class FormReader:
    """Reads one form. `feed` gives each part as it begins, and then its bytes."""

    def __init__(self, content_type: str) -> None:
        boundary = parse_options_header(content_type)[1].get(b"boundary")
        if not boundary:
            raise InvalidRequestError(
                "Content-Type: multipart/form-data needs a boundary; let the client set the header",
                param="Content-Type",
            )
        self._found: list[Part | bytes] = []
        self._field, self._value = bytearray(), bytearray()  # of the header being read
        self._disposition = b""
        self._complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._begin,
                    "on_header_field": self._header_field,
                    "on_header_value": self._header_value,
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._data,
                    "on_end": self._end,
                },
            )
        except FormParserError as error:
            raise _malformed(error) from None

    def feed(self, data: bytes) -> list[Part | bytes]:
        """What these bytes complete."""
        self._found = []
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _malformed(error) from None
        return self._found

    def finish(self) -> None:
        """The body has ended: raises if the form has not."""
        if not self._complete:
            raise _malformed("it ends before its last boundary")

    def _begin(self) -> None:
        self._disposition = b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._field.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        options = parse_options_header(self._disposition)[1]
        filename = options.get(b"filename")
        if b"name" not in options:
            raise _malformed("a part has no name")
        sent_as = _encoded_filename(self._disposition) if filename is None else _text(filename)
        self._found.append(Part(_text(options[b"name"]), sent_as))

    def _data(self, data: bytes, start: int, end: int) -> None:
        self._found.append(data[start:end])

    def _end(self) -> None:
        self._complete = True


def _encoded_filename(disposition: bytes) -> str | None:
    """The parameter `filename*` (RFC 5987), which the form's parser passes over."""
    found = _ENCODED.search(disposition)
    return None if found is None else unquote(_text(found[1].rpartition(b"'")[2]))


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _malformed(reason: object) -> InvalidRequestError:
    return InvalidRequestError(f"the multipart form is malformed: {reason}; send it again")
