"""ARCHITECTURE.md names real files and real things in them, and no module of the packages it describes is left out."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "ARCHITECTURE.md").read_text()


def names_in(path: Path) -> set[str]:
    """Top-level names, and members of classes as `Class.member`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            members = (n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
            found |= {f"{node.name}.{member.name}" for member in members}
    return found


@pytest.mark.parametrize("mention", sorted(set(re.findall(r"`(\w+/\w+\.py(?:: [\w.]+)?)`", PAGE))))
def test_what_is_named_is_there(mention: str) -> None:
    file, _, name = mention.partition(": ")
    path = ROOT / file
    assert path.is_file()
    assert not name or name in names_in(path)


@pytest.mark.parametrize("package", ["protocol", "slicing", "dht", "peer", "client", "client/api", "dashboard"])
def test_every_module_has_its_place(package: str) -> None:
    section, inside = "", False
    for line in PAGE.splitlines():
        if line.startswith("| `"):
            inside = line.startswith(f"| `{package}` |")
        if inside and line.startswith("|"):
            section += line
    listed = set(re.findall(r"`(\w+)`", section))
    glue = {"__init__", "__main__", "cli", "config", "potluck_pb2", "potluck_pb2_grpc"}
    modules = {path.stem for path in (ROOT / package).glob("*.py")} - glue
    assert modules <= listed | {package}, f"not in ARCHITECTURE.md: {sorted(modules - listed)}"


def test_recovery_reads_like_its_drawing() -> None:
    steps = re.findall(r"^ \d Mender\.(\w+)", PAGE, re.MULTILINE)
    source = (ROOT / "client/mender.py").read_text()
    assert steps[-1:] == ["_connect"]
    assert steps == [name for name in re.findall(r"^    (?:async )?def (\w+)", source, re.MULTILINE) if name in steps]


def test_it_fits_two_screens() -> None:
    assert len(PAGE.splitlines()) <= 120
