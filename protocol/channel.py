"""gRPC credentials and channels: TLS pinned to the certificate in a peer's record, explicit limits, keepalive.

Fork rule (measured, transport.md section 1): gRPC must never be used in a child forked from a process that has used it
(it aborts or hangs). Potluck forks nothing: the DHT runs in our own loop, workers are threads or spawned processes.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
from collections.abc import Iterable, Sequence

import grpc
import grpc.aio

from protocol.descriptors import connections_at_most
from protocol.errors import BadMessage, PeerError, PeerFault, PeerFull, PeerLost
from protocol.identity import Identity, common_name, load_certificate
from protocol.limits import CONNECTION_IDLE_S, HANDSHAKE_S, MAX_ERROR_CHARS, METADATA_BYTES, STREAMS_PER_CONNECTION
from protocol.messages import shown

KEEPALIVE_EVERY_MS = 10_000
KEEPALIVE_TIMEOUT_MS = 20_000
"""A dead connection is noticed at most 30 s after its last sign of life; steps have their own, shorter, deadlines.
Pings wait behind payload: on a slow line a shorter time would end connections that are at work."""
MIN_PING_GAP_MS = 5_000
"""Below what clients send: a stricter server would end their connections with `too_many_pings`."""
RECONNECT_MIN_MS = 100
RECONNECT_MAX_MS = 2_000
NEXT_ADDRESS_MS = 250
"""A connection attempt gets this head start before the next of a peer's addresses is tried beside it (RFC 8305)."""

Option = tuple[str, int | str]

_REASONS = (
    (
        "CERTIFICATE_VERIFY_FAILED: certificate has expired",
        "the certificate in its record has expired; restarted, the peer makes a new one",
    ),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "at its address another certificate is shown than its record names: another program answers there, or the peer "
        "has a new certificate and its record is old",
    ),
    ("WRONG_VERSION_NUMBER", "what answers at its address speaks no TLS"),
    ("Connection refused", "nothing listens at its address"),
    ("Deadline Exceeded", "it does not answer in time"),
)
"""What gRPC says (the sign of it), and what that means. gRPC itself has one status for all of them."""

_FAILED = (grpc.ChannelConnectivity.TRANSIENT_FAILURE, grpc.ChannelConnectivity.SHUTDOWN)


def server_credentials(identity: Identity) -> grpc.ServerCredentials:
    """TLS as `identity`. Clients stay anonymous: what they may do follows from session and edge tokens."""
    return grpc.ssl_server_credentials([(identity.tls_key_pem, identity.certificate_pem)])


def server_options(max_message_bytes: int) -> list[Option]:
    """Options of `grpc.aio.server` that match `open_channel`, and what strangers may cost.

    gRPC does not count connections by address, and lets nobody see them before their first call.
    """
    return [
        *_shared_options(max_message_bytes),
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_S * 1e3)),
        ("grpc.max_connection_idle_ms", int(CONNECTION_IDLE_S * 1e3)),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
        ("grpc.max_allowed_incoming_connections", connections_at_most()),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", METADATA_BYTES),  # else what is beyond is refused only now and then
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_GAP_MS),
        ("grpc.http2.max_ping_strikes", 0),  # pings that a line held back arrive all at once
        ("grpc.so_reuseport", 0),  # else a second server on the same port would silently take half the connections
    ]


def open_channel(
    address: str | Sequence[str], certificate_der: bytes, *, max_message_bytes: int, turn: int = 0
) -> grpc.aio.Channel:
    """A channel to an address (`host:port` or `[v6]:port`) that only the holder of the certificate's key can answer.

    Connects at the first call, and anew when a connection has broken. Of several addresses those are tried that belong
    together (see `targets`), in their order, the next one when one has refused or been silent for a quarter of a
    second. With another certificate at an address every call fails at once with UNAVAILABLE, which `peer_error` makes a
    `PeerLost` that says so.

    Args:
        turn: which of the `targets`, counted round.

    Raises:
        BadRecord: the certificate does not parse.
    """
    name = common_name(load_certificate(certificate_der))
    pem = ssl.DER_cert_to_PEM_cert(certificate_der).encode()
    options: list[Option] = [
        *_shared_options(max_message_bytes),
        ("grpc.ssl_target_name_override", name),
        ("grpc.happy_eyeballs_connection_attempt_delay_ms", NEXT_ADDRESS_MS),
        ("grpc.initial_reconnect_backoff_ms", RECONNECT_MIN_MS),
        ("grpc.min_reconnect_backoff_ms", RECONNECT_MIN_MS),
        ("grpc.max_reconnect_backoff_ms", RECONNECT_MAX_MS),
        # One that failed waits before it tries again; a peer that came back at the same address must not wait with it.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_http_proxy", 0),  # peers are dialled directly, whatever the environment says of proxies
        ("grpc.enable_retries", 0),  # re-sending is the session's business: it knows which steps were applied
        ("grpc.service_config_disable_resolution", 1),
    ]
    credentials = grpc.ssl_channel_credentials(root_certificates=pem)
    found = targets([address] if isinstance(address, str) else address)
    return grpc.aio.secure_channel(found[turn % len(found)], credentials, options=options)


def targets(addresses: Iterable[str]) -> tuple[str, ...]:
    """What grpc calls them: IP addresses all together, which it tries in this order, and each name for itself.

    Those come first that the first address belongs to. IPv4 addresses among IPv6 ones are written as these; grpc dials
    them as what they are, where there is no IPv6, too.
    """
    literal: list[tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, str]] = []
    names: list[str] = []
    listed = list(addresses)
    for address in listed:
        host, _, port = address.rpartition(":")
        try:
            literal.append((ipaddress.ip_address(host.strip("[]")), port))
        except ValueError:
            names.append(f"dns:///{address}")
    if not literal:
        return tuple(names)
    if all(host.version == 4 for host, _ in literal):
        together = "ipv4:" + ",".join(f"{host}:{port}" for host, port in literal)
    else:
        mapped = [(f"::ffff:{host}" if host.version == 4 else str(host), port) for host, port in literal]
        together = "ipv6:" + ",".join(f"[{host}]:{port}" for host, port in mapped)
    return (*names, together) if names and names[0] == f"dns:///{listed[0]}" else (together, *names)


async def connected(channel: grpc.aio.Channel, timeout_s: float) -> bool:
    """Connects, and returns as soon as it is known whether that could be done."""
    state = channel.get_state(try_to_connect=True)
    try:
        async with asyncio.timeout(timeout_s):
            while state not in (grpc.ChannelConnectivity.READY, *_FAILED):
                await channel.wait_for_state_change(state)
                state = channel.get_state(try_to_connect=True)
    except TimeoutError:
        return False
    return state is grpc.ChannelConnectivity.READY


def has_failed(channel: grpc.aio.Channel) -> bool:
    """Could the channel not connect the last time it tried? It would wait before it tries again."""
    return channel.get_state() in _FAILED


def peer_error(error: grpc.aio.AioRpcError, peer_id: str | None = None) -> PeerError | BadMessage:
    """What a failed call means, where the peer did not send an error of its own."""
    said = shown(error.details() or "no details", MAX_ERROR_CHARS)  # in part the other side's words
    detail = f"{error.code().name.lower().replace('_', ' ')}: {said}"
    too_large = "larger than max" in (error.details() or "")  # grpc's words for a broken message limit
    if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and not too_large:
        return PeerFull(f"the peer refused: {detail}", peer_id=peer_id)
    if too_large or error.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED):
        return BadMessage(f"the peer did not understand: {detail}", peer_id=peer_id)
    if error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        return PeerFault(f"the peer failed: {detail}", peer_id=peer_id)
    reason = next((words for sign, words in _REASONS if sign in (error.details() or "")), detail)
    return PeerLost(f"the peer is lost: {reason}", peer_id=peer_id)


async def why_unreachable(channel: grpc.aio.Channel, timeout_s: float) -> str:
    """Why `connected` was false, in words."""
    try:
        await channel.unary_unary("/potluck.Peer/Ping")(b"", timeout=timeout_s)
    except grpc.aio.AioRpcError as error:
        return peer_error(error).message
    return "it answers now"


def _shared_options(max_message_bytes: int) -> Sequence[Option]:
    return (
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", KEEPALIVE_EVERY_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", KEEPALIVE_TIMEOUT_MS),  # else 60 s pass before an unanswered ping counts
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )
