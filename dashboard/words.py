"""Numbers, times and strangers' names, as people read them. Pure."""

from __future__ import annotations

import ipaddress
import re
from datetime import UTC, datetime

_NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
_IPV4 = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(?![\w:])")  # or a time of day
HIDDEN = "(address)"


def count(number: int, noun: str) -> str:
    """`one peer`, `3 peers` as in a sentence: small numbers are words."""
    word = _NUMBERS[number] if number < len(_NUMBERS) else str(number)
    return f"{word} {noun}" if number == 1 else f"{word} {noun}s"


def duration(seconds: float) -> str:
    """`under a minute`, `12 min`, `5 h`, `3 days`: coarse, so that pages need not change all the time."""
    minutes = int(seconds) // 60
    if minutes < 1:
        return "under a minute"
    if minutes < 120:
        return f"{minutes} min"
    return f"{minutes // 60} h" if minutes < 48 * 60 else f"{minutes // (24 * 60)} days"


def number(value: float) -> str:
    """With three digits that count, and thin spaces between thousands: `0.42`, `41`, `12 345`."""
    if value < 10:
        return f"{value:.2g}" if value else "0"
    return f"{round(value):,}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def milliseconds(value: float | None) -> str:
    """`0.4 ms`, `12 ms`, `1.5 s`; `?` for None."""
    if value is None:
        return "?"
    if value >= 1000:
        return f"{value / 1000:.1f} s"
    return f"{value:.1f} ms" if value < 10 else f"{value:.0f} ms"


def percent(part: float, whole: float) -> str:
    """`41 %`; `none` of nothing."""
    return f"{100 * part / whole:.0f} %" if whole else "none"


def clock(at: float) -> str:
    """`14:05:31 UTC`."""
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S UTC")


def iso(at: float) -> str:
    """For machines: `2026-11-28T14:05:31Z`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def without_addresses(text: str) -> str:
    """What a stranger wrote, with whatever looks like an IP address made unreadable. Not HTML: templates escape it."""
    return _IPV4.sub(HIDDEN, _IPV6.sub(_hidden, text))


def _hidden(match: re.Match[str]) -> str:
    try:
        ipaddress.IPv6Address(match[0].rstrip("."))
    except ValueError:
        return match[0]
    return HIDDEN
