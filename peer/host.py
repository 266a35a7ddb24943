"""The serving half of a peer: a loaded span behind a gRPC port. Knows nothing about the swarm."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version

import grpc
import torch

from dht.background import background
from dht.record import State
from peer import memory
from peer.accounts import Accounts
from peer.budget import JournalBudget, KvBudget, MessageBudget
from peer.compute import ComputeThread
from peer.config import PeerConfig
from peer.engine import Engine
from peer.gate import Entry, Gate
from peer.gauge import Gauge, probe_kv_bytes
from peer.house import House
from peer.intake import Intake
from peer.link import Resolve
from peer.links import open_links
from peer.meter import Meter
from peer.receipts import Receipts
from peer.scheduler import Scheduler
from peer.service import PeerService
from peer.session import Session
from peer.table import SessionTable
from peer.tally import Tally
from peer.unreadable import UnreadableAsEmpty
from peer.worker import Worker
from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.channel import server_credentials, server_options
from protocol.errors import ConfigError
from protocol.hosts import address
from protocol.identity import Identity
from protocol.limits import MESSAGE_BYTES, PAYLOAD_BYTES, WIRE_VERSION
from slicing import RaggedSpan, SpanModel, hasten, trouble
from tensor_codecs import dtype_name, names

logger = logging.getLogger(__name__)

SWEEP_S = 5.0  # between two looks for sessions to reclaim
DRAIN_LOOK_S = 0.1
HANDED_OVER_S = 3.0  # a session without a step for so long has gone on elsewhere, or will when it needs to
HEADER_SLACK = 2.0  # payload bytes of a step over its hidden states in float32: masks, positions, extras
MAX_STREAMS = 1024

SOFTWARE = f"potluck/{version('potluck')}"


@dataclass(frozen=True, slots=True)
class Served:
    """What is served, as names: of the model, its fingerprint, and where it may be cut."""

    model: str
    fingerprint: str
    n_blocks: int
    legal_cuts: tuple[int, ...]


def holding_up(sessions: Iterable[tuple[float, bool]], now_s: float) -> int:
    """How many sessions a peer that leaves has to wait for: those with a step under way, or a moment ago.

    A session that only rests (its user reads, or thinks) is not waited for: it goes on elsewhere when it goes on.

    Args:
        sessions: of each, when it last had a step, and whether one waits, is computed or handed on.
    """
    return sum(1 for used_s, is_busy in sessions if is_busy or now_s - used_s < HANDED_OVER_S)


class SpanHost:
    """A loaded span, its sessions, its compute thread and its gRPC server. Make one with `open`."""

    def __init__(
        self,
        model: SpanModel,
        ragged: RaggedSpan | None,
        served: Served,
        identity: Identity,
        config: PeerConfig,
        kv_tokens: int,
        entry: Entry,
    ) -> None:
        self.model = model
        self.batches = ragged is not None
        self.served = served
        self.identity = identity
        self.state: State = "joining"
        self.port = 0
        self.meter = Meter(len(model.span))
        self.tally = Tally()
        self.budget = KvBudget(kv_tokens, len(model.span))
        self.messages = MessageBudget(config.message_mib << 20)
        self.journals = JournalBudget(config.journal_mib << 20)
        self.sessions = SessionTable(
            model,
            ragged,
            served.fingerprint,
            served.n_blocks,
            self.budget,
            self.journals,
            self.messages,
            codecs=frozenset(names()),
            max_sessions=config.max_sessions,
            idle_s=config.session_idle_s,
            resume_s=config.resume_s,
        )
        self._config = config
        self._compute = ComputeThread(config.threads)
        worker = Worker(model, ragged, self.sessions, config.max_step_tokens)
        scheduler = Scheduler(config.max_batch, config.max_step_tokens, config.prefill_share)
        self.engine = Engine(worker, self._compute, self.sessions, scheduler, self.meter, self.tally)
        bytes_per_s = math.inf if config.clients_mib_s is None else config.clients_mib_s * (1 << 20)
        gate = Gate(identity.peer_id, Accounts(config.allowance, bytes_per_s), entry)
        intake = Intake(self.sessions, gate.accounts, self._max_payload_bytes())
        self.house = House(gate, self.sessions, intake, self.engine, self._compute, self.tally, Receipts(identity))
        self.service = PeerService(self.house, self._describe)
        self._server: grpc.aio.Server | None = None

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        model: SpanModel,
        served: Served,
        identity: Identity,
        config: PeerConfig,
        resolve: Resolve,
        entry: Entry | None = None,
        *,
        last_port: int = 0,
    ) -> AsyncIterator[SpanHost]:
        """A host that listens at `config.host`:`config.port`; closes the port and ends the thread on exit.

        Args:
            resolve: finds the records of the peers that come after this one in clients' chains.
            entry: who may open sessions; None: everybody.
            last_port: taken again if `config.port` leaves it open, and nobody else took it meanwhile.

        Raises:
            ConfigError: the port is taken, or the address is not this machine's.
        """
        await asyncio.to_thread(hasten, model.model, config.threads or torch.get_num_threads())
        per_token = await asyncio.to_thread(probe_kv_bytes, model)
        ragged = await asyncio.to_thread(batching, model, config.max_batch)
        kv_tokens = config.kv_tokens or memory.kv_tokens(memory.free_bytes(model.device), per_token)
        host = cls(model, ragged, served, identity, config, kv_tokens, entry or Entry())
        try:
            async with open_links(resolve, host.service.refused, direct=config.direct) as host.house.links:
                await host._listen(last_port)
                try:
                    gauge = Gauge(model, host.engine, host._compute, host.meter)
                    await gauge.measure()
                    async with (
                        background(host.engine.run(), "engine"),
                        background(host._sweep(), "session-sweeper"),
                        background(gauge.run(), "idle-measurement"),
                    ):
                        yield host
                finally:
                    await host._stop()
        finally:
            await asyncio.to_thread(host._compute.close)

    def drain(self) -> None:
        """From now on: no new sessions; clients are told, so that those that there are go on elsewhere."""
        self.state = "draining"
        self.sessions.draining = True
        self.service.drain()

    def resume(self) -> None:
        """Takes new sessions, again."""
        self.state = "online"
        self.sessions.draining = False

    async def drained(self, timeout_s: float) -> int:
        """Waits until no session holds up a leaving peer, `timeout_s` at most. Returns how many still do."""
        deadline_s = time.monotonic() + timeout_s
        while (left := self.holding_up) and time.monotonic() < deadline_s:  # noqa: ASYNC110  # it lies in times, too
            await asyncio.sleep(DRAIN_LOOK_S)
        return left

    @property
    def holding_up(self) -> int:
        """How many sessions a leaving peer has to wait for now."""
        return holding_up(((s.last_used_s, _is_busy(s)) for s in self.sessions), time.monotonic())

    async def _listen(self, last_port: int) -> None:
        self._server = grpc.aio.server(
            interceptors=[UnreadableAsEmpty()],
            options=server_options(MESSAGE_BYTES),
            maximum_concurrent_rpcs=MAX_STREAMS,
        )
        pb_grpc.add_PeerServicer_to_server(self.service, self._server)  # type: ignore[no-untyped-call]  # generated
        wanted = [self._config.port] if self._config.port or not last_port else [last_port, 0]
        for port in wanted:
            at = address(self._config.host, port)
            try:
                self.port = self._server.add_secure_port(at, server_credentials(self.identity))
                break
            except RuntimeError as error:
                if port == wanted[-1]:
                    raise ConfigError(
                        f"cannot listen at {at}: is another program using it? choose another --port"
                    ) from error
        await self._server.start()

    async def _stop(self) -> None:
        if self._server is not None:
            await self._server.stop(self._config.stop_grace_s)

    async def _sweep(self) -> None:
        ended = read = 0
        while True:
            await asyncio.sleep(SWEEP_S)
            if dropped := self.sessions.reclaim(time.monotonic()):
                logger.info("reclaimed %d idle sessions", dropped)
            if self.sessions.ended > ended or self.tally.computed["prefill"] > read:
                ended, read = self.sessions.ended, self.tally.computed["prefill"]
                await asyncio.to_thread(memory.give_back)

    def _max_payload_bytes(self) -> int:
        bytes_per_token = self.model.hidden_size * 4 * HEADER_SLACK
        return min(PAYLOAD_BYTES, int(self._config.max_step_tokens * bytes_per_token) + MESSAGE_BYTES)

    def _describe(self) -> pb.Description:
        return pb.Description(
            wire_version=WIRE_VERSION,
            software=SOFTWARE,
            peer_id=self.identity.peer_id,
            fingerprint=self.served.fingerprint,
            model=self.served.model,
            start=self.model.span.start,
            stop=self.model.span.stop,
            n_blocks=self.served.n_blocks,
            legal_cuts=self.served.legal_cuts,
            dtype=dtype_name(self.model.dtype),
            codecs=names(),
            max_session_tokens=self.budget.tokens_total,
            kv_tokens_total=self.budget.tokens_total,
            kv_tokens_left=self.sessions.tokens_left,
            state=self.state,
            max_step_tokens=self._config.max_step_tokens,
        )


def _is_busy(session: Session) -> bool:
    under_way = (session.running, session.handing_on)
    return not session.deliveries.empty() or any(work is not None and not work.done() for work in under_way)


def batching(model: SpanModel, max_batch: int) -> RaggedSpan | None:
    """Packs steps of several sessions over the span, where that is wanted, and gives what steps of each alone give."""
    if max_batch == 1:
        return None
    if reason := trouble(model):
        logger.warning("steps of different sessions are computed one by one, since this model cannot batch: %s", reason)
        return None
    return RaggedSpan(model)
