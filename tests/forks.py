"""Python processes that have begun before they are needed: forked from one that has imported torch and the like.

A `python -m peer serve` takes some seconds of CPU to start, and all but a few tenths of these go into imports, so that
tests of many processes would mostly watch Python import. What is forked here is a process of its own in all that they
look at: signals, kill -9, groups, streams, exit codes, p2pd, memory. Only its command line and its first environment
(as /proc shows them) are another's. That a command starts from nothing is proven where `anew` is asked for (see
`tests.processes`), by the README's commands, and by the demo.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import pytest

PRELOADED = "tests.preloaded"
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
"""What libraries read when they are imported, as `tests.processes.variables` has it."""


class Forked:
    """A `python -m ...` in a session of its own. Used as a `subprocess.Popen` is.

    Args:
        has_input: can be written to its standard input?
    """

    def __init__(
        self,
        arguments: Sequence[str],
        stdout: Path,
        stderr: Path,
        environ: Mapping[str, str],
        cwd: Path,
        *,
        has_input: bool,
    ) -> None:
        self.stdin: IO[bytes] | None = None
        reader: Connection | None = None
        server = _server()
        if has_input:
            reader, writer = server.Pipe(duplex=False)
            self.stdin = os.fdopen(os.dup(writer.fileno()), "wb")
            writer.close()
        call = (tuple(arguments), reader, stdout, stderr, dict(environ), cwd)
        self._process = server.Process(target=_run, args=call, daemon=True)
        self._process.start()
        if reader is not None:
            reader.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float) -> int:
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("forked", timeout)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@cache
def _server() -> Any:
    """Where processes are forked. It outlives the test that needs it first, and so is not at home there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("POTLUCK_")]:
            patch.delenv(name)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _run(
    arguments: Sequence[str],
    stdin: Connection | None,
    stdout: Path,
    stderr: Path,
    environ: Mapping[str, str],
    cwd: Path,
) -> None:
    """In the forked process: what `python -m` does."""
    assert PRELOADED in sys.modules, f"{PRELOADED} was not imported before: see what it says by hand"
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as a terminal's programs have it, wherever tests run
    if stdin is not None:
        os.dup2(stdin.fileno(), 0)
        stdin.close()
        sys.stdin = open(0, closefd=False)  # noqa: SIM115  # as long as the process lives
    for path, number in ((stdout, 1), (stderr, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    tempfile.tempdir = None  # chosen anew, by what this environment says
    module, *rest = arguments
    sys.argv = [module, *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
