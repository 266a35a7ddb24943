"""Audits: now and then another peer computes again what a hop of a session did, and both are compared.

A step that is drawn is looked at after the fact, beside the session: its answer does not wait. Since the auditor needs
the keys and values of all tokens before, it computes all steps up to the one that was drawn, and all of them are
compared that were not before. Nothing tells a peer that it will be audited before it has signed what it sent.

    step ─► note ─► drawn? ─► _account: what went in and came out, as the digests say ─► Shadow.run ─► compare
                                      └─► Mismatch ─► a third peer ─► verdict.judge ─► blame, and the session is doubted
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace

from client.account import Account, Partial, Recanted, Unaudited, recalled
from client.blame import Blame
from client.chain import Link
from client.comparison import Mismatch, compare
from client.config import ClientConfig
from client.hop import Hop
from client.moves import Moves
from client.open_chain import OpenChain
from client.own_blocks import OwnBlocks, OwnShadow
from client.padding import meaningful_rows
from client.peers import Peers
from client.replicas import Replicas
from client.sample import Sample
from client.shadow import Recomputation, Shadow
from client.spec import SessionSpec
from client.tolerance import Kind, Tolerance, kind_of
from client.verdict import Distance, judge
from protocol.errors import Doubted, PotluckError, SessionLost
from protocol.journal import Entry, StepLog
from protocol.messages import StepResult

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class AuditStats:
    """What was audited in a session: audits, tokens that were compared in them, audits that could not be made (by why),
    and peers that were found to lie."""

    audits: int = 0
    tokens: int = 0
    unaudited: Counter[str] = field(default_factory=Counter)
    liars: list[str] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Case:
    """One hop under audit.

    Attributes:
        wanted: the latest step that was drawn; None: none is waiting.
        sample: of what was compared with this shadow.
        is_undecided: it and its only replica differ: there is nothing to be learned any more.
    """

    hop: Hop
    wanted: int | None = None
    shadow: Recomputation | None = None
    sample: Sample = field(default_factory=Sample)
    task: asyncio.Task[None] | None = None
    is_undecided: bool = False

    def drop_shadow(self) -> None:
        shadow, self.shadow = self.shadow, None
        self.sample = Sample()
        if shadow is not None:
            shadow.dismiss()


class Auditor:
    """Audits one session.

    Args:
        inputs: what entered the first block.
        chain: the session's.
        tell: told, in one sentence, what was found.
        own: blocks that this client has itself; where they cover a hop's, it audits that without others.

    Attributes:
        doubt: why the session has to begin anew; None: nothing speaks against it.
    """

    def __init__(
        self,
        spec: SessionSpec,
        peers: Peers,
        blame: Blame,
        config: ClientConfig,
        inputs: StepLog,
        chain: OpenChain,
        tell: Callable[[str], None],
        rng: random.Random | None = None,
        own: OwnBlocks | None = None,
    ) -> None:
        self.stats = AuditStats()
        self.doubt: Doubted | None = None
        self._spec = spec
        self._blame = blame
        self._config = config
        self._inputs = inputs
        self._chain = chain
        self._tell = tell
        self._replicas = Replicas(spec, peers, blame, config)
        self._own = own
        self._rng = rng or random.Random()
        self._audits = config.audit > 0
        self._results = StepLog(keeps_all=True)  # what came out of the last block
        self._starts: list[int] = []  # position of each step
        self._moves = Moves()
        self._cases: dict[Hop, _Case] = {}
        self._silent: set[Hop] = set()  # that recall only a part, in whose place there is nobody

    def note(self, entry: Entry, result: StepResult) -> None:
        """A step is through: keeps what its hops say of it, and draws which of them are audited."""
        hops = self._chain.hops
        for said in result.step.trace:
            for hop in hops:
                if hop.link.span.start == said.start:
                    hop.ledger.tell(entry.step_id, said)
        self._starts.append(entry.position)
        self._look_at_ledgers(hops)
        if not self._audits:
            return
        self._moves.note(entry)
        self._results.put(replace(Entry.of(result.step), ops=entry.ops, trace=()))
        for hop in hops:
            if self._rng.random() < self._config.audit:
                self._want(hop, entry.step_id)

    def check(self) -> None:
        """Raises Doubted where the session has to begin anew."""
        if (doubt := self.doubt) is not None:  # another one each time: its traceback knows the session
            raise Doubted(doubt.message, position=doubt.position, peer_id=doubt.peer_id)

    @property
    def is_settled(self) -> bool:
        """Is nothing in doubt, and no audit under way? For any thread: of a copy."""
        return self.doubt is None and all(case.task is None or case.task.done() for case in list(self._cases.values()))

    def _look_at_ledgers(self, hops: Sequence[Hop]) -> None:
        for index, hop in enumerate(hops):
            if hop.ledger.doubt is not None and self.doubt is None:
                # It signed something else than it sent, or the next one changed what it had said.
                for suspect in hops[index : index + 2]:
                    self._blame.add(suspect.link.peer.peer_id)
                self._begin_anew(hop, self._starts[hop.ledger.doubt], "signed something else than came from it")

    def distrust_last(self, why: PotluckError) -> Doubted:
        """The last hop gave what cannot be. Returns the doubt that the session is in now."""
        hop = self._chain.hops[-1]
        self._blame.add(hop.link.peer.peer_id)
        self._begin_anew(hop, self._starts[-1], f"gave {why.message}")
        assert self.doubt is not None
        return self.doubt

    # ------------------------------------------------------------------ beside the session

    def _want(self, hop: Hop, step_id: int) -> None:
        case = self._cases.setdefault(hop, _Case(hop))
        case.wanted = step_id
        if case.task is None or case.task.done():
            case.task = asyncio.get_running_loop().create_task(self._follow(case), name=f"audit of {hop.name}")

    async def _follow(self, case: _Case) -> None:
        while (step_id := case.wanted) is not None and self.doubt is None and not case.is_undecided:
            case.wanted = None
            try:
                await self._audit(case, step_id)
            except Unaudited as why:
                self.stats.unaudited[str(why)] += 1
            except SessionLost:
                self.stats.unaudited["what is needed is no longer kept"] += 1
                case.drop_shadow()
            except PotluckError as error:
                logger.debug("an audit of %s failed: %s", case.hop.name, error)
                self.stats.unaudited["a peer that was needed failed"] += 1
                case.drop_shadow()
            except Exception:
                logger.exception("an audit of %s failed", case.hop.name)
                self.stats.unaudited["it failed"] += 1
                case.drop_shadow()
        if case.hop not in self._chain.hops:
            case.drop_shadow()

    async def _audit(self, case: _Case, step_id: int) -> None:
        """Compares all steps up to this one that were not compared before; all, where the shadow cannot go on."""
        if case.shadow is not None:
            if case.shadow.next_step > step_id:
                return
            try:
                await self._compare(case, case.shadow, step_id)
                return
            except Partial:
                raise
            except (Unaudited, SessionLost) as why:
                logger.debug("the shadow of %s begins anew: %s", case.hop.name, why)
                case.drop_shadow()
        if case.hop not in self._chain.hops:
            raise Unaudited("the hop has left the chain")
        link = case.hop.link
        case.shadow = self._own_shadow(link) or await self._replicas.shadow(link, {link.peer.peer_id})
        await self._compare(case, case.shadow, step_id)

    async def _compare(self, case: _Case, shadow: Recomputation, step_id: int) -> None:
        rows = await asyncio.to_thread(meaningful_rows, self._inputs.recall(shadow.next_step))  # before more is cropped
        account = await self._account(case.hop, shadow.next_step, step_id)
        if account is None:
            return
        recomputed = await shadow.run(account.inputs, self._moves, self._config.step_timeout_s)
        within = self._within(case.hop, [kind_of(case.hop.link.peer)], shadow)
        tokens, mismatch = await asyncio.to_thread(
            compare,
            account.inputs,
            account.outputs,
            recomputed,
            within,
            step_id,
            case.sample,
            rows,
            random.Random(self._rng.getrandbits(64)),  # compared in a thread
            is_routed=self._spec.is_routed,
        )
        self.stats.audits += 1
        self.stats.tokens += tokens
        if mismatch is not None:
            await self._decide(case, shadow, mismatch)

    async def _account(self, hop: Hop, first_step: int, step_id: int) -> Account | None:
        """What entered the hop in the steps from the first to the last one, and what came out, as it stands by it.
        None: somebody does not stand by what was said before, and is given up for it.

        Raises:
            Unaudited: that is not known.
            Partial: a peer tells only a part; it is given up, too.
            PotluckError: a peer does not tell.
        """
        account = await recalled(hop, self._chain.hops, self._inputs, self._results, first_step, step_id)
        has_left = not {hop, account.before or hop} <= set(self._chain.hops)
        if has_left:  # perhaps with a pass that was cancelled, whose steps, and crops, never were
            account = replace(account, memories=(), wanted=())
        try:
            account.check()
        except Partial as part:
            self._give_up(part.hop, self._starts[part.step_id])
            raise
        except Recanted as liar:
            self._convict(liar.hop, self._starts[liar.step_id], liar.why)
            return None
        if has_left:
            raise Unaudited("the hop has left the chain")
        return account

    def _within(self, hop: Hop, kinds: Iterable[Kind], *shadows: Recomputation) -> Tolerance:
        """How far the results of the first of these shadows may be from those of peers of these kinds, which may be the
        second one's: as far as any of the one may be from any of the other. That a shadow is coarse as a whole does not
        make it like another coarse peer."""
        crossings = 1 + sum(shadow.n_hops - 1 for shadow in shadows)
        pairs = itertools.product(shadows[0].kinds, kinds)
        found = [Tolerance.between(*pair, self._spec.codec, len(hop.link.span), crossings) for pair in pairs]
        return Tolerance(max(each.token for each in found), max(each.typical for each in found))

    def _own_shadow(self, link: Link) -> OwnShadow | None:
        """This client as the shadow of a hop, if it has its blocks, and compares them as closely as others would."""
        own = self._own
        if own is None or not own.covers(link.span):
            return None
        without, kind = {link.peer.peer_id}, kind_of(link.peer)
        if kind.quantization not in ("", "none") and self._replicas.of(link, without, kind) is not None:
            return None  # whose weights were rounded in the same way
        return OwnShadow(own, link.span, self._spec.codec)

    # ------------------------------------------------------------------ who lies

    async def _decide(self, case: _Case, shadow: Recomputation, mismatch: Mismatch) -> None:
        hop = case.hop
        if not shadow.peer_ids:
            self._convict(hop, mismatch.position, "did not compute what this client did")
            return
        third = await self._third(hop, shadow, mismatch)
        if third is None:
            case.drop_shadow()
            return
        culprit = judge(mismatch.apart, *third)
        logger.info("%s and %s differ by %.2g: %s", hop.name, shadow.name, mismatch.apart.apart, culprit)
        parties = {hop.link.peer.peer_id} | shadow.peer_ids
        if culprit == "audited":
            self._convict(hop, mismatch.position, "did not compute what two others did")
        elif culprit == "auditor":
            self._avoid(shadow.peer_ids, lied=len(shadow.peer_ids) == 1)
            self._tell(f"{shadow.name} did not compute what two others did, and is avoided")
            case.drop_shadow()
        elif self._replicas.of(hop.link, parties) is not None:
            self._avoid(parties, lied=False)
            self._begin_anew(hop, mismatch.position, f"and {shadow.name} do not agree")
        else:
            case.is_undecided = True
            self._tell(
                f"{hop.name} and {shadow.name} do not compute the same, and nobody else serves these blocks: the answer"
                f" is doubtful from token {mismatch.position + 1} on"
            )
            case.drop_shadow()

    async def _third(
        self, hop: Hop, shadow: Recomputation, mismatch: Mismatch
    ) -> tuple[Distance | None, Distance | None] | None:
        """How far a third peer is from the audited one and from its auditor. None: somebody was given up on the way,
        and what was compared is not what entered the hop."""
        third: Shadow | None = None
        try:
            third = await self._replicas.shadow(hop.link, {hop.link.peer.peer_id} | shadow.peer_ids)
            account = await self._account(hop, 0, mismatch.step_id)
            if account is None:
                return None
            tensors = await third.run(account.inputs, self._moves, self._config.step_timeout_s)
            to_hop = self._within(hop, [kind_of(hop.link.peer)], third)
            to_shadow = self._within(hop, shadow.kinds, third, shadow)
            return mismatch.from_third(account.inputs, tensors, to_hop, to_shadow)
        except Partial:
            return None
        except (Unaudited, PotluckError) as error:
            logger.debug("there is no third peer to decide: %s", error)
            return None, None
        finally:
            if third is not None:
                third.dismiss()

    def _convict(self, hop: Hop, position: int, why: str) -> None:
        self._avoid({hop.link.peer.peer_id}, lied=True)
        self._begin_anew(hop, position, why)

    def _give_up(self, hop: Hop, position: int) -> None:
        """It recalls only a part from this position on, as a liar would; but nobody has seen it lie."""
        peer_id, why = hop.link.peer.peer_id, "recalls only a part of what it sent"
        self._blame.add(peer_id)
        if self._replicas.of(hop.link, {peer_id}) is not None:
            self._begin_anew(hop, position, why)
        elif hop not in self._silent:
            self._silent.add(hop)
            self._tell(f"{hop.name} {why}, and nobody else serves these blocks: what it does cannot be audited")

    def _avoid(self, peer_ids: Collection[str], *, lied: bool) -> None:
        """For long only who was found to lie: of several, one of which lied, the others are honest."""
        for peer_id in peer_ids:
            if lied:
                self._blame.accuse(peer_id)
                self.stats.liars.append(peer_id)
            else:
                self._blame.add(peer_id)

    def _begin_anew(self, hop: Hop, position: int, why: str) -> None:
        what = f"{hop.name} {why}: what follows token {position} is doubtful"
        self.doubt = self.doubt or Doubted(what, position=position, peer_id=hop.link.peer.peer_id)
        self._tell(what)

    # ------------------------------------------------------------------ its end

    async def settle(self, timeout_s: float) -> None:
        """Waits for audits that are under way."""
        if running := [case.task for case in self._cases.values() if case.task is not None]:
            await asyncio.wait(running, timeout=timeout_s)

    async def close(self) -> None:
        """Ends audits that are under way."""
        running = [case.task for case in self._cases.values() if case.task is not None and not case.task.done()]
        for task in running:
            self.stats.unaudited["the session ended before"] += 1
            task.cancel()
        if running:
            await asyncio.wait(running)
        for case in self._cases.values():
            case.drop_shadow()
        self._cases.clear()
