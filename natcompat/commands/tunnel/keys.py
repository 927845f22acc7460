"""Reads key material from a tunnel's file, from key files and from the environment.

A key is a row of hexadecimal digits; white space between them is ignored.
No error shows contents of a file.
"""

from __future__ import annotations

import os
from typing import Final

from natcompat.commands.tunnel.files import expand, read_file
from natcompat.commands.tunnel.form import KEY, ConfigurationError, Place, hide_keys
from natcompat.ipsec import Key

_RIGHT: Final = (
    "Write hexadecimal digits in quotes, two a byte (openssl rand -hex 36 makes some), "
    'or { key_file = "PATH" } or { key_environment = "NAME" }'
)


class KeyReader:
    """Reads the keys of one file; remembers whether some stood in it."""

    def __init__(self, place: Place) -> None:
        self._directory = place.path.parent
        self.inline: bool = False
        """Whether the file itself holds keys."""

    def read(self, place: Place, name: str, value: object) -> Key:
        """Return the key that `value` is, or says where to find, as `name` of the table at `place`."""
        if isinstance(value, str):
            self.inline = True
            return self._decode(place, name, value, "this")
        if not isinstance(value, dict):
            raise place.error(name, "a key is wanted", _RIGHT)
        inner = Place(place.path, place.text, place.table, place.number, name)
        values = inner.read(value, KEY)
        if sum(value is not None for value in values.values()) != 1:
            raise inner.error("", "either key_file or key_environment is wanted", _RIGHT)
        if values["key_file"] is not None:
            try:
                path = self._directory / expand(values["key_file"], "the key file")
                text = read_file(path, "the key file").decode("ascii", "replace")
            except ConfigurationError as error:
                where = inner.error("key_file", error.strerror or "", error.remedy)
                raise ConfigurationError(error.errno or 0, where.strerror or "", where.remedy) from None
            return self._decode(place, name, text, f"what {hide_keys(str(path))} holds")
        variable: str = values["key_environment"]
        if variable not in os.environ:
            raise inner.error(
                "key_environment",
                f"the environment has no {hide_keys(variable)}",
                "Set it, to hexadecimal digits",
            )
        return self._decode(place, name, os.environ[variable], f"what {hide_keys(variable)} holds")

    @staticmethod
    def _decode(place: Place, name: str, text: str, whose: str) -> Key:
        try:
            return Key(bytes.fromhex(text))
        except ValueError:
            pass  # its message shows nothing, but its traceback does
        raise place.error(name, f"{whose} is not a row of hexadecimal digits, two a byte", _RIGHT)
