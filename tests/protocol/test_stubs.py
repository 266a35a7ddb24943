"""The generated stubs in the repository are those of potluck.proto."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["potluck_pb2.py", "potluck_pb2.pyi", "potluck_pb2_grpc.py"])
def test_stubs_match_the_proto_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "protocol").mkdir()
    subprocess.run(
        [
            sys.executable, "-m", "grpc_tools.protoc", f"-I{ROOT}", f"--python_out={tmp_path}",
            f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}", str(ROOT / "protocol/potluck.proto"),
        ],
        check=True,
        cwd=ROOT,
        timeout=60,
    )  # fmt: skip
    assert (tmp_path / "protocol" / name).read_text() == (ROOT / "protocol" / name).read_text(), "run `make proto`"
