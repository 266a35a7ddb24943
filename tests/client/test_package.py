import subprocess
import sys

import client


def test_all_names_are_there() -> None:
    assert sorted(client.__all__) == dir(client)
    assert all(getattr(client, name).__name__ == name for name in client.__all__)


def test_importing_does_not_import_torch() -> None:
    modules = "client, client.cli, peer.cli, dht.cli"
    program = f"import sys, {modules}; print([m for m in ('torch', 'hivemind') if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert shown.stdout.strip() == "[]"
