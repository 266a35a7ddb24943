"""The half of hivemind that finds things: its Kademlia nodes, and libp2p below them.

hivemind's own `__init__` imports its other half too, training over the internet: two thirds of a second that each
process would pay at its start. So here the package comes to be without running it. Whoever asks the package itself for
a name (`hivemind.Optimizer`) has it run then, and gets it.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    """A package whose `__init__` runs when a name of it is asked for that only this can know."""

    def __getattr__(self, name: str) -> Any:
        if (part := sys.modules.get(f"{self.__name__}.{name}")) is not None:
            return part  # which is being imported, and becomes an attribute when it has been
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


if "hivemind" not in sys.modules:
    _spec = find_spec("hivemind")
    if _spec is None:
        raise ModuleNotFoundError("No module named 'hivemind'", name="hivemind")
    sys.modules["hivemind"] = module_from_spec(_spec)
    sys.modules["hivemind"].__class__ = _Package

# After what is above, and therefore not at the top.
import hivemind.utils.logging as logging  # noqa: E402
from hivemind.dht.node import DHTNode  # noqa: E402
from hivemind.dht.routing import DHTID  # noqa: E402
from hivemind.dht.storage import DHTLocalStorage, DictionaryDHTValue  # noqa: E402
from hivemind.dht.validation import DHTRecord, RecordValidatorBase  # noqa: E402
from hivemind.p2p import P2P, PeerID  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.control import P2PDaemonError  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure  # noqa: E402
from hivemind.proto import dht_pb2  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402
from hivemind.utils.timed_storage import ValueWithExpiration  # noqa: E402

__all__ = [
    "DHTID",
    "P2P",
    "ControlFailure",
    "DHTLocalStorage",
    "DHTNode",
    "DHTRecord",
    "DictionaryDHTValue",
    "Multiaddr",
    "P2PDaemonError",
    "PeerID",
    "RecordValidatorBase",
    "ValueWithExpiration",
    "dht_pb2",
    "logging",
]
