"""The grid of the page, peers x blocks: what is drawn in each of its cells. Pure.

A cell is a glyph and a colour: it reads the same on paper, in grey, and by those who see few colours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dashboard import words
from dashboard.events import name_of
from dashboard.health import ModelHealth, PeerHealth, Standing
from protocol.span import Span

MAX_COLUMNS = 32
"""Of the grid, so that it fits a phone; models of more blocks have several in a column."""
PEERS_SHOWN = 100
"""Of a model: those with trouble first. The JSON has them all."""
TICKS = 6  # above it, at most


@dataclass(frozen=True, slots=True)
class Cell:
    """One place of the grid: what is drawn, its style, and what it means."""

    glyph: str
    style: str
    word: str


CROSS = "\N{MULTIPLICATION SIGN}"
EMPTY = Cell("·", "none", "not served here")
PARTLY = Cell("◧", "part", "a part of these blocks")
CELLS = {
    Standing.SERVING: Cell("■", "serving", "serves"),
    Standing.UNASKED: Cell("□", "unasked", "serves, not asked yet"),
    Standing.DRAINING: Cell("▽", "draining", "finishes, takes nothing new"),
    Standing.JOINING: Cell("○", "joining", "loads"),
    Standing.SILENT: Cell(CROSS, "silent", "does not answer"),
}
LEGEND = tuple(CELLS.values())


@dataclass(frozen=True, slots=True)
class Row:
    """A peer in the grid; `text` says the same in words."""

    name: str
    cells: tuple[Cell, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Grid:
    """Peers x blocks.

    Attributes:
        ticks: the first block of each column, or "" where there is no room for it.
        counts: how many peers serve each column, at least.
        per_column: blocks in a column.
    """

    ticks: tuple[str, ...]
    counts: tuple[Cell, ...]
    rows: tuple[Row, ...]
    per_column: int

    @property
    def legend(self) -> tuple[Cell, ...]:
        """What the glyphs mean: of those that occur."""
        drawn = {cell.style for row in self.rows for cell in row.cells}
        return tuple(cell for cell in (*LEGEND, PARTLY, EMPTY) if cell.style in drawn)


def grid(model: ModelHealth) -> Grid:
    """Peers x blocks of a model, in at most `MAX_COLUMNS` columns."""
    width = -(-model.n_blocks // MAX_COLUMNS)
    places = [Span(start, min(start + width, model.n_blocks)) for start in range(0, model.n_blocks, width)]
    step = max(1, -(-len(places) // TICKS))
    ticks = tuple(str(place.start) if index % step == 0 else "" for index, place in enumerate(places))
    counts = tuple(_count(min(model.replicas[place.start : place.stop]), place) for place in places)
    rows = tuple(_row(peer, places) for peer in shown_peers(model.peers))
    return Grid(ticks, counts, rows, width)


def _count(peers: int, place: Span) -> Cell:
    style = "gap" if peers == 0 else "single" if peers == 1 else "several"
    return Cell(str(peers) if peers < 10 else "+", style, f"blocks {place}: {words.count(peers, 'peer')}")


def _row(peer: PeerHealth, places: Sequence[Span]) -> Row:
    name, drawn = name_of(peer), CELLS[peer.standing]
    cells = []
    for place in places:
        if peer.record.span.covers(place):
            cells.append(drawn)
        elif peer.record.span.overlap(place):
            cells.append(PARTLY if peer.counts else drawn)
        else:
            cells.append(EMPTY)
    return Row(name, tuple(cells), f"blocks {peer.record.span}: {drawn.word}")


def shown_peers(peers: Sequence[PeerHealth]) -> list[PeerHealth]:
    """At most `PEERS_SHOWN`, in order; where there are more, those are left out that have no trouble."""
    chosen = sorted(range(len(peers)), key=lambda index: (peers[index].standing is Standing.SERVING, index))
    return [peers[index] for index in sorted(chosen[:PEERS_SHOWN])]
