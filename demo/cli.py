"""`python -m demo`: a swarm on this machine, an answer through all of it, and an accident. Also `train`, `evaluate`."""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from demo.client import Answer, Client, joining
from demo.facts import CAPITALS
from demo.screen import chain_line, grid, heading, new_console, short, what_to_try
from demo.swarm import MODEL, DemoFailed, LocalSwarm, PeerNode, local_swarm, uneven_spans
from demo.world import Question
from protocol.command import EXIT_FAILURE, PotluckGroup, set_up_logging, tame_libraries
from protocol.span import Span

if TYPE_CHECKING:
    from client.chain import Link

FIRST = Question("What is the capital of France?", CAPITALS["France"], "capitals")
LONG = Question("Sort these words: tower, guitar, anchor, meadow.", "anchor, guitar, meadow, tower", "sorting")
KILL_AFTER_TOKENS = 12  # of LONG's 30
EXIT_INTERRUPTED = 130


@click.group(
    cls=PotluckGroup, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]}
)  # fmt: skip
@click.option("--keep", is_flag=True, help="Leave the swarm running afterwards, and say what to try next.")
@click.option("--model", default=MODEL, hidden=True, help="Another checkpoint of the demo model: a folder.")
@click.option("-v", "--verbose", count=True, help="Say more on stderr; twice for everything.")
@click.version_option(package_name="potluck")
@click.pass_context
def cli(context: click.Context, keep: bool, model: str, verbose: int) -> None:
    """Watch a swarm on this machine: three peers answer together, one is killed, the answer goes on.

    Exit code 0: every answer was right; 1: something was not, and is said.
    """
    tame_libraries()
    set_up_logging(verbose)
    if context.invoked_subcommand is None:
        sys.exit(asyncio.run(_demo(new_console(), model, keep=keep)))


@cli.command()
@click.argument("folder", default=Path("potluck-demo-trained"), type=click.Path(file_okay=False, path_type=Path))
def train(folder: Path) -> None:
    """Train the embedded model from scratch into FOLDER [default: potluck-demo-trained]. About an hour on two cores.

    Its stages are kept in FOLDER-stages: a training that was interrupted goes on after the last finished one.
    """
    from demo.train import Recipe
    from demo.train import train as run

    set_up_logging(1)
    folder.mkdir(parents=True, exist_ok=True)
    run(Recipe(), folder)
    click.echo(f"The model is in {folder}; examine it with: python -m demo evaluate {shlex.quote(str(folder))}")


@cli.command()
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--questions", type=click.IntRange(min=8), default=2400, show_default=True, help="Of each kind.")
@click.option("--broken-questions", type=click.IntRange(min=1), default=240, show_default=True,
              help="For each way to break the chain.")  # fmt: skip
@click.option("--seed", type=int, default=7, show_default=True, help="Chooses the questions.")
def evaluate(folder: Path | None, questions: int, broken_questions: int, seed: int) -> None:
    """Examine the embedded model, or the one in FOLDER: exact answers per task, and through broken chains."""
    from demo.evaluate import MODEL as EMBEDDED
    from demo.evaluate import evaluate as run

    click.echo(run(folder or EMBEDDED, n=questions, n_broken=broken_questions, seed=seed).markdown())


# -------------------------------------------------------------------------------------------------- the demo


async def _demo(console: Console, model: str, *, keep: bool) -> int:
    """The whole demo, with its clean-up. Returns the exit code."""
    started_s = time.monotonic()
    interrupted = _Interrupts(console)
    try:
        async with local_swarm(model) as swarm:
            interrupted.begin(swarm)
            await _story(console, swarm)
            if keep:
                console.print(heading("The swarm stays. In another terminal:"))
                for line in what_to_try(swarm):
                    console.print(line, markup=False, soft_wrap=True)
                console.print("Ctrl-C ends it.")
                await _until_interrupted()
            console.print(heading("Everyone leaves"))
        console.print(f"Done in {time.monotonic() - started_s:.0f} s; nothing stays behind.")
    except DemoFailed as error:
        console.print(f"\n✗ The demo failed: {error}", style="bold red", markup=False)
        return EXIT_FAILURE
    except asyncio.CancelledError:
        console.print("\nStopped; nothing stays behind.")
        return EXIT_INTERRUPTED
    return 0


async def _story(console: Console, swarm: LocalSwarm) -> None:
    """Each step in order.

    Raises:
        DemoFailed: a step went wrong, or an answer was not right.
    """
    spans = uneven_spans(swarm.model)
    everyone = f"One model of {spans[-1].stop} blocks, three volunteers, none of whom has all of it."
    console.print(Panel.fit(everyone, title="Potluck"))
    async with AsyncExitStack() as stack:
        console.print(heading("1. A bootstrap node, through which the others meet"))
        with console.status("starting ..."):
            bootstrap = await swarm.start_bootstrap()
        console.print(f"   {swarm.maddr}  (pid {bootstrap.pid}, {bootstrap.ready_s:.1f} s)", soft_wrap=True)

        console.print(heading("2. Three peers share this machine; a client joins meanwhile"))
        client = await stack.enter_async_context(joining(swarm))
        await _start_peers(console, swarm, spans)
        with console.status("the client joins ..."):
            await client.sees(swarm.peers)

        console.print(heading("3. A question, answered through all three"))
        first = await _ask(console, client, FIRST)
        _check_chain(first, swarm)
        console.print(chain_line(first.chain), soft_wrap=True)

        console.print(heading("4. A spare volunteer comes, and meanwhile a longer answer, undisturbed"))
        starting = asyncio.create_task(swarm.start_peer(spans[1]))
        stack.callback(starting.cancel)
        undisturbed = await _ask(console, client, LONG)
        with console.status("the spare peer starts ..."):
            spare = await starting
            await client.sees(swarm.peers)
        console.print(f"   the spare peer {short(spare.peer_id)} serves blocks {spare.span} too (pid {spare.pid})")

        console.print(heading("5. The same question; in the middle of the answer a peer in use is killed"))
        await _accident(console, swarm, client, undisturbed)
        console.print(grid(swarm, spans))


async def _start_peers(console: Console, swarm: LocalSwarm, spans: tuple[Span, ...]) -> None:
    with Live(grid(swarm, spans), console=console, transient=True) as live:

        async def start(span: Span) -> None:
            await swarm.start_peer(span)
            live.update(grid(swarm, spans))

        try:
            async with asyncio.TaskGroup() as tasks:
                for span in spans:
                    tasks.create_task(start(span))
        except* DemoFailed as failures:
            raise failures.exceptions[0] from None
    console.print(grid(swarm, spans))


async def _ask(console: Console, client: Client, question: Question) -> Answer:
    """One question, streamed and checked."""
    console.print(f"   you:   {question.text}")
    console.print("   model: ", end="")
    answer = await client.ask(question.text, _writer(console))
    console.print()
    _check_text(answer, question)
    return answer


async def _accident(console: Console, swarm: LocalSwarm, client: Client, undisturbed: Answer) -> None:
    """The long question again, with a kill -9 between two of its tokens."""
    killed: list[PeerNode] = []

    def after_token(n: int, chain: tuple[Link, ...]) -> None:
        if n == KILL_AFTER_TOKENS:
            link = next(link for link in chain if undisturbed.chain[1].span.start in link.span)
            killed.append(swarm.kill(link.peer.peer_id))
            console.print(Text(f"[kill -9 {killed[0].pid}]", style="bold red"), end="")

    said_before = len(client.events)
    console.print(f"   you:   {LONG.text}")
    console.print("   model: ", end="")
    answer = await client.ask(LONG.text, _writer(console), after_token)
    console.print()
    for event in client.events[said_before:]:
        console.print(f"   · {event}", markup=False, style="yellow", soft_wrap=True)
    if not killed or any(link.peer.peer_id == killed[0].peer_id for link in answer.chain):
        raise DemoFailed("no peer in use was killed in the middle of the answer")
    if answer.tokens != undisturbed.tokens:
        raise DemoFailed(f"after the accident the answer was {answer.text!r}, undisturbed {undisturbed.text!r}")
    console.print(chain_line(answer.chain), soft_wrap=True)
    pause_ms, usual_ms = answer.pause_s(KILL_AFTER_TOKENS) * 1e3, answer.usual_pause_s * 1e3
    console.print(
        f"   ✓ the same {len(answer.tokens)} tokens as undisturbed. The loss of peer {short(killed[0].peer_id)} "
        f"({killed[0].span}) cost a pause of {pause_ms:.0f} ms; usually {usual_ms:.0f} ms pass between two tokens.",
        style="green", soft_wrap=True,
    )  # fmt: skip


def _check_text(answer: Answer, question: Question) -> None:
    if answer.text != question.answer:
        raise DemoFailed(f"the answer to {question.text!r} was {answer.text!r}, not {question.answer!r}")


def _check_chain(answer: Answer, swarm: LocalSwarm) -> None:
    """The answer came through all peers, and every block was run once, in order."""
    if {link.peer.peer_id for link in answer.chain} != set(swarm.peers):
        raise DemoFailed("the answer did not come through all three peers")
    edges = [0, *(link.span.stop for link in answer.chain)]
    if [link.span.start for link in answer.chain] != edges[:-1] or edges[-1] != answer.chain[0].peer.n_blocks:
        raise DemoFailed("the chain does not run every block once, in order")


class _Interrupts:
    """Ctrl-C, SIGTERM and a closed terminal end the demo in order; a second one kills what is still there."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._count = 0

    def begin(self, swarm: LocalSwarm) -> None:
        """From now on; to be called in the demo's task."""
        task = asyncio.current_task()
        assert task is not None
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._interrupted, task, swarm)

    def _interrupted(self, task: asyncio.Task[object], swarm: LocalSwarm) -> None:
        self._count += 1
        if self._count == 1:
            self._console.print("\nleaving; once more to kill what is left at once")
            swarm.terminate_all()  # now: what the task waits for, an import for example, cannot be cancelled
            task.cancel()
        else:
            swarm.kill_all()


async def _until_interrupted() -> None:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        task = asyncio.current_task()
        assert task is not None
        task.uncancel()  # that is how this is meant to end


def _writer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, end="", markup=False, style="bold")
