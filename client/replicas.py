"""Replicas: the other peers that could compute what one hop of a session does."""

from __future__ import annotations

from collections.abc import Collection

from client.account import Unaudited
from client.blame import Blame
from client.chain import Link, choose_chain
from client.config import ClientConfig
from client.peers import Peers
from client.shadow import Shadow
from client.spec import SessionSpec
from client.tolerance import Kind, kind_of
from protocol.errors import BlocksMissing


class Replicas:
    """Finds them for one session, and has them shadow its hops."""

    def __init__(self, spec: SessionSpec, peers: Peers, blame: Blame, config: ClientConfig) -> None:
        self._spec = spec
        self._peers = peers
        self._blame = blame
        self._config = config

    def of(self, link: Link, without: Collection[str], kind: Kind | None = None) -> tuple[Link, ...] | None:
        """Peers for the blocks of a hop, none of them lately at fault, and of this kind only, if it is given; None:
        nobody else serves these blocks.

        Args:
            without: ids of peers that are not asked for.
        """
        shunned = self._blame.avoided().union(without)
        able = [
            peer
            for peer in self._peers.peers()
            if peer.peer_id not in shunned and self._spec.codec in peer.codecs and kind in (None, kind_of(peer))
        ]
        try:
            return choose_chain(
                able,
                link.span,
                times=self._peers.times(),
                rules=self._config.rules,
                cuts=self._peers.cuts(),
                kv_tokens=self._spec.batch * self._spec.max_tokens,
            )
        except BlocksMissing:
            return None

    async def shadow(self, link: Link, without: Collection[str]) -> Shadow:
        """A shadow of a hop, opened, by other peers than these: of its kind, if there are any.

        Raises:
            Unaudited: nobody else serves the blocks.
            PotluckError: one of them does not open the session.
        """
        links = self.of(link, without, kind_of(link.peer)) or self.of(link, without)
        if links is None:
            raise Unaudited("nobody else serves the blocks")
        shadow = Shadow(links, self._peers, self._spec)
        try:
            await shadow.open(self._config.probe_timeout_s, self._config.open_timeout_s)
        except BaseException:
            shadow.dismiss()
            raise
        return shadow
