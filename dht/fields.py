"""Checks of single fields of a record's payload: a typed value within its limits, or `BadRecord` naming the field."""

from __future__ import annotations

import ipaddress
import math
import re
from collections.abc import Mapping

from protocol.errors import BadRecord

_ADDRESS = re.compile(
    r"(?P<host>[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]):(?P<port>[0-9]{1,5})"
)
_TOKEN = re.compile(r"[A-Za-z0-9._+:/-]*")


class Fields:
    """A payload's map, read field by field. Unknown fields are left alone: newer software may say more."""

    def __init__(self, values: object) -> None:
        if not isinstance(values, Mapping) or not all(isinstance(name, str) for name in values):
            raise BadRecord("the payload is not a map of names")
        self._values = values

    def __contains__(self, name: str) -> bool:
        """Is the field there? Asked for those that older software does not write."""
        return name in self._values

    def _get(self, name: str) -> object:
        if name not in self._values:
            raise BadRecord(f"{name} is missing")
        return self._values[name]

    def text(self, name: str, max_chars: int) -> str:
        """Printable text (people will see it in terminals and browsers)."""
        return _text(self._get(name), name, max_chars)

    def token(self, name: str, max_chars: int, *, empty: bool = False) -> str:
        """A machine-readable name: letters, digits and `._+:/-`."""
        value = _token(self._get(name), name, max_chars)
        if not value and not empty:
            raise BadRecord(f"{name} is empty")
        return value

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self._get(name)
        if not isinstance(value, str) or value not in allowed:
            raise BadRecord(f"{name} is none of {', '.join(allowed)}")
        return value

    def flag(self, name: str) -> bool:
        value = self._get(name)
        if not isinstance(value, bool):
            raise BadRecord(f"{name} is neither true nor false")
        return value

    def whole(self, name: str, low: int, high: int) -> int:
        return _whole(self._get(name), name, low, high)

    def number(self, name: str, low: float, high: float) -> float:
        value = self._get(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise BadRecord(f"{name} is not a number")
        if not (math.isfinite(value) and low <= value <= high):
            raise BadRecord(f"{name} is not between {low:g} and {high:g}")
        return float(value)

    def number_or_none(self, name: str, low: float, high: float) -> float | None:
        return None if self._get(name) is None else self.number(name, low, high)

    def raw(self, name: str, max_bytes: int) -> bytes:
        return _bytes(self._get(name), name, max_bytes)

    def tokens(self, name: str, max_items: int, max_chars: int) -> tuple[str, ...]:
        return tuple(_token(item, name, max_chars) for item in self._list(name, max_items))

    def wholes(self, name: str, max_items: int, low: int, high: int) -> tuple[int, ...]:
        return tuple(_whole(item, name, low, high) for item in self._list(name, max_items))

    def raws(self, name: str, max_items: int, max_bytes: int) -> tuple[bytes, ...]:
        return tuple(_bytes(item, name, max_bytes) for item in self._list(name, max_items))

    def numbers_by_name(self, name: str, max_items: int, max_chars: int, high: float) -> tuple[tuple[str, float], ...]:
        """A map of tokens to numbers from 0 to `high`, smallest number first."""
        values = self._get(name)
        if not isinstance(values, Mapping) or len(values) > max_items:
            raise BadRecord(f"{name} is not a map of at most {max_items}")
        inner = Fields(values)
        found = [(_token(key, name, max_chars), inner.number(key, 0, high)) for key in values]
        return tuple(sorted(found, key=lambda item: (item[1], item[0])))

    def addresses(self, name: str, max_items: int) -> tuple[str, ...]:
        return tuple(check_address(item, name) for item in self._list(name, max_items))

    def _list(self, name: str, max_items: int) -> list[object]:
        value = self._get(name)
        if not isinstance(value, list) or len(value) > max_items:
            raise BadRecord(f"{name} is not a list of at most {max_items}")
        return value


def check_address(value: object, name: str = "address") -> str:
    """`host:port` or `[v6]:port`.

    Raises:
        BadRecord: it is not, or the port is none.
    """
    match = _ADDRESS.fullmatch(value) if isinstance(value, str) and value.isascii() else None
    if not isinstance(value, str) or match is None or not 1 <= int(match["port"]) <= 65535:
        raise BadRecord(f"{name} has an entry that is not host:port")
    if match["host"].startswith("["):
        try:
            ipaddress.IPv6Address(match["host"][1:-1])
        except ValueError:
            raise BadRecord(f"{name} has an entry that is not an IPv6 address") from None
    else:
        try:
            match["host"].encode("idna")  # else whoever dials it meets an error that no network gives
        except UnicodeError:
            raise BadRecord(f"{name} has an entry whose host is no name") from None
    return value


def _text(value: object, name: str, max_chars: int) -> str:
    if not isinstance(value, str) or len(value) > max_chars or not value.isprintable():
        raise BadRecord(f"{name} is not printable text of at most {max_chars} characters")
    return value


def _token(value: object, name: str, max_chars: int) -> str:
    if not isinstance(value, str) or len(value) > max_chars or not _TOKEN.fullmatch(value):
        raise BadRecord(f"{name} is not a name of at most {max_chars} plain characters")
    return value


def _whole(value: object, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadRecord(f"{name} is not a whole number from {low} to {high}")
    return value


def _bytes(value: object, name: str, max_bytes: int) -> bytes:
    if not isinstance(value, bytes) or len(value) > max_bytes:
        raise BadRecord(f"{name} is not at most {max_bytes} bytes")
    return value
