"""What the docs say is read off the code says what the code says; Grafana asks for what there is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from potluck.reference import METRICS, PART, PROGRAMS, commands, exists, exported, filled_in, main, metrics

ROOT = Path(__file__).parent.parent
PAGES = [page for page in sorted(ROOT.glob("docs/**/*.md")) if PART.search(page.read_text())]
DASHBOARDS = sorted(ROOT.glob("docker/grafana/dashboards/*.json"))
HERE = [module for module in METRICS if exists(module)]
PREFIXES = {
    "peer.metrics": ("potluck_peer_",),
    "client.api.metrics": ("potluck_api_",),
    "dashboard.metrics": ("potluck_swarm_", "potluck_dashboard_"),
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_generated_parts_are_up_to_date(page: Path) -> None:
    text = page.read_text()
    assert filled_in(text) == text, f"run: python -m potluck.reference {page.relative_to(ROOT)}"


def test_every_command_and_metric_has_its_part() -> None:
    parts = {f"{part['what']} {part['of']}".strip() for page in PAGES for part in PART.finditer(page.read_text())}
    programs = [name for name in PROGRAMS if exists(f"{name}.cli")]
    assert parts == {*(f"commands {name}" for name in programs), *(f"metrics {module}" for module in HERE)}
    assert "peer" in programs and "peer.metrics" in HERE


def test_what_is_behind_is_noticed() -> None:
    begin, end = "<!-- generated: metrics peer.metrics -->\n", "<!-- end -->"
    page = f"# A page\n\n{begin}| an old table |\n{end}\n\nand more\n"
    assert filled_in(page) == f"# A page\n\n{begin}\n{metrics('peer.metrics')}\n{end}\n\nand more\n"
    with pytest.raises(ValueError, match="recipes"):
        filled_in("<!-- generated: recipes peer -->\n<!-- end -->")


def test_pages_are_written_only_where_they_are_behind(tmp_path: Path) -> None:
    behind, none = tmp_path / "behind.md", tmp_path / "none.md"
    behind.write_text("<!-- generated: metrics peer.metrics -->\n<!-- end -->\n")
    none.write_text("nothing to see\n")
    said = [CliRunner().invoke(main, [str(behind), str(none)]) for _ in range(2)]
    assert [done.exit_code for done in said] == [0, 0]
    assert said[0].output == f"{behind} is new\n" and said[1].output == ""
    assert metrics("peer.metrics") in behind.read_text()


def test_every_option_of_every_command_is_listed() -> None:
    text = "\n".join(commands(name) for name in PROGRAMS if exists(f"{name}.cli"))
    for option in ("--metrics-port", "--bootstrap-list", "--trusted-only", "--keep"):
        assert f"`{option}" in text or f", {option}" in text
    assert "also `potluck serve`" in text


@pytest.mark.parametrize("module", HERE)
def test_metrics_have_proper_names(module: str) -> None:
    names = [name for name, *_ in exported(module)]
    assert len(set(names)) == len(names)
    for name, kind, _, text in exported(module):
        assert name.startswith(PREFIXES[module])
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name) and name.endswith("_total") == (kind == "counter"), name
        assert text.endswith("."), name


def queries(part: Any) -> Iterator[str]:
    """The queries of a dashboard, wherever they are."""
    if isinstance(part, list):
        for item in part:
            yield from queries(item)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key in ("expr", "query") and isinstance(value, str):
                yield value
            else:
                yield from queries(value)


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.name)
def test_grafana_asks_for_metrics_that_exist(dashboard: Path) -> None:
    kinds = {name: kind for module in HERE for name, kind, *_ in exported(module)}
    later = tuple(prefix for module in METRICS if module not in HERE for prefix in PREFIXES[module])
    asked = {name for query in queries(json.loads(dashboard.read_text())) for name in re.findall(r"potluck_\w+", query)}
    assert any(name.startswith("potluck_peer_") for name in asked)
    for name in asked:
        base = re.sub(r"_(bucket|sum|count)$", "", name)
        known = name in kinds if base == name else kinds.get(base) == "histogram"
        assert known or name.startswith(later or "-"), name


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.name)
def test_grafana_asks_peers_by_labels_that_exist(dashboard: Path) -> None:
    labels = {label for _, _, names, _ in exported("peer.metrics") for label in names}
    text = " ".join(query for query in queries(json.loads(dashboard.read_text())) if "potluck_peer_" in query)
    asked = set(re.findall(r"[{,]\s*(\w+)\s*[=!]", text))
    asked |= {label.strip() for names in re.findall(r"(?:by|without) \(([^)]*)\)", text) for label in names.split(",")}
    assert {"state", "kind", "way", "reason"} <= asked
    assert asked <= labels | {"le", "instance"}


def test_docker_scrapes_and_charts_the_same_prometheus() -> None:
    (dashboard,) = DASHBOARDS
    source = (ROOT / "docker/grafana/provisioning/datasources/prometheus.yaml").read_text()
    uids = set(re.findall(r'"uid": "(\w+)"', dashboard.read_text())) - {"potluck"}
    assert uids == {"prometheus"} and "uid: prometheus" in source
