"""The half of hivemind that finds things: its Kademlia nodes, and libp2p below them.

hivemind's packages import its other half too, training over the internet, and with it torch: two seconds that each
process would pay at its start, of which a node of the DHT uses nothing. So here these packages come to be without
running their `__init__`. Whoever asks one of them for another name than those of `_HOMES` (`hivemind.Optimizer`) has it
run then, and gets it: with a hivemind that is divided otherwise all works, only slower.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_HOMES = {
    "hivemind": {},
    "hivemind.dht": {},
    "hivemind.utils": {
        "MSGPackSerializer": "serializer",
        "SerializerBase": "serializer",
        "get_dht_time": "timed_storage",
        "get_logger": "logging",
    },
}
"""The packages, and in which of their modules those names are that the half which is used takes from them."""


class _Package(ModuleType):
    """A package whose `__init__` runs when a name of it is asked for that only this can know."""

    def __getattr__(self, name: str) -> Any:
        if (part := sys.modules.get(f"{self.__name__}.{name}")) is not None:
            return part  # which is being imported, and becomes an attribute when it has been
        if (home := _HOMES[self.__name__].get(name)) is not None:
            return getattr(import_module(f"{self.__name__}.{home}"), name)
        self.__class__ = ModuleType  # type: ignore[assignment]
        assert self.__spec__ is not None and self.__spec__.loader is not None
        self.__spec__.loader.exec_module(self)
        return getattr(self, name)


for _name in _HOMES:
    if _name not in sys.modules:
        _spec = find_spec(_name)
        if _spec is None:
            raise ModuleNotFoundError(f"No module named {_name!r}", name=_name)
        sys.modules[_name] = module_from_spec(_spec)
        sys.modules[_name].__class__ = _Package

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
