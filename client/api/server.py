"""Runs the gateway until it is told to end."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from client.api.app import create_app
from client.api.config import ApiConfig
from client.api.gateway import open_gateway
from client.config import ClientConfig
from client.model import SwarmModelForCausalLM
from protocol.errors import ConfigError
from protocol.hosts import address

GRACE_S = 5  # seconds for streams to end, once told to; whole seconds, as uvicorn wants them


class _Server(uvicorn.Server):
    """Ends with code 0 when it is told to: uvicorn's own would raise the signal once more, when all is done."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(client: ClientConfig, config: ApiConfig, say: Callable[[str], None], on_event: Callable[[str], None]) -> None:
    """Joins the swarm and serves until SIGINT or SIGTERM.

    Args:
        say: told where it listens, once it does.
        on_event: told when a chain changes or waits.

    Raises:
        ConfigError: nothing can listen there.
        SwarmNotFound, ModelError: see `SwarmModelForCausalLM.from_pretrained`.
    """
    with (
        _listener(config) as listener,
        SwarmModelForCausalLM.from_pretrained(config=client, on_event=on_event) as model,
    ):
        gateway = open_gateway(model, config)
        settings = uvicorn.Config(
            create_app(gateway),
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=GRACE_S,
            server_header=False,
        )
        say(f"api of {gateway.name} at http://{address(config.host, listener.getsockname()[1])}/v1")
        _Server(settings).run(sockets=[listener])


def _listener(config: ApiConfig) -> socket.socket:
    """Bound before the model is loaded: a port that is taken is told at once."""
    try:
        family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((config.host, config.port), family=family, backlog=1024)
    except OSError as error:
        raise ConfigError(f"cannot listen at {config.host}, port {config.port}: {error.strerror or error}") from error
