"""Small JSON state files: written whole or not at all, read with suspicion."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from protocol.identity import write_private

log = logging.getLogger(__name__)

MAX_STATE_BYTES = 256 << 10


def write_json(path: Path, value: Any) -> None:
    """Replace `path`, making its folder if need be.

    Raises:
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(path, json.dumps(value, indent=1).encode())


def read_json(path: Path) -> Any:
    """What `write_json` wrote; None: there is no such file, or it is damaged (then a warning says so)."""
    try:
        if path.stat().st_size > MAX_STATE_BYTES:
            raise ValueError("it is too large")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log.warning("ignoring the state file %s: %s", path, error)
        return None
