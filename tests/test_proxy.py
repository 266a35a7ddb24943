"""The chaos suite's proxy before a small server that echoes."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from tests.processes import until
from tests.proxy import BLACK_HOLE, PASS, RESET, SLOW, SLOW_LORIS, Proxies, Proxy, owner_of, proxies

SOON_S = 5.0
SILENCE_S = 0.3  # so long nothing comes where nothing may come
HELLO = b"hello"


@pytest.fixture(name="echo_port")
def _echo_port() -> Iterator[int]:
    """The port of a server that gives back what it gets, and ends a connection when the other side does."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    def echo(connection: socket.socket) -> None:
        with closing(connection):
            try:
                while data := connection.recv(1 << 16):
                    connection.sendall(data)
            except OSError:
                pass

    thread = threading.Thread(target=serve)
    thread.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


@pytest.fixture(name="place")
def _place() -> Iterator[Proxies]:
    before = set(threading.enumerate())
    with proxies() as place:
        yield place
    left = {thread for thread in threading.enumerate() if thread not in before}
    assert not [thread for thread in left if thread.name.startswith(("proxies", "asyncio"))]


@pytest.fixture(name="proxy")
def _proxy(place: Proxies, echo_port: int) -> Proxy:
    return place.before(echo_port)


def connect(proxy: Proxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout=SOON_S)


def receive(connection: socket.socket, n: int) -> bytes:
    data = b""
    while len(data) < n and (more := connection.recv(n - len(data))):
        data += more
    return data


def silent(connection: socket.socket) -> bool:
    connection.settimeout(SILENCE_S)
    try:
        connection.recv(1)
    except TimeoutError:
        return True
    finally:
        connection.settimeout(SOON_S)
    return False


def test_what_passes_is_what_came_and_is_counted_by_owner(proxy: Proxy) -> None:
    data = os.urandom(1 << 20)
    with connect(proxy) as connection:
        threading.Thread(target=connection.sendall, args=(data,)).start()
        assert receive(connection, len(data)) == data
        assert proxy.owners == [os.getpid()]
    assert proxy.traffic[os.getpid()].up == len(data)
    assert (proxy.total.up, proxy.total.down) == (len(data), len(data))


def test_an_end_is_passed_on_in_each_direction(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(HELLO)
        connection.shutdown(socket.SHUT_WR)  # the server answers all the same, and then ends its side
        assert receive(connection, 100) == HELLO
    until(lambda: not proxy.owners, "the connection to be forgotten", SOON_S)


def test_a_black_hole_is_silent_and_loses_nothing(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(HELLO)
        assert receive(connection, len(HELLO)) == HELLO
        proxy.set(BLACK_HOLE)
        connection.sendall(HELLO)
        with connect(proxy) as other:
            other.sendall(b"another")
            assert silent(connection)
            assert silent(other)
            proxy.set(PASS)
            assert receive(connection, len(HELLO)) == HELLO
            assert receive(other, 7) == b"another"


def test_a_black_hole_hides_an_end(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(HELLO)
        assert receive(connection, len(HELLO)) == HELLO
        proxy.set(BLACK_HOLE)
        connection.shutdown(socket.SHUT_WR)
        assert silent(connection)
        proxy.set(PASS)
        assert connection.recv(1) == b""


def test_a_reset_ends_present_and_new_connections(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(HELLO)
        assert receive(connection, len(HELLO)) == HELLO
        proxy.set(RESET)
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
    with connect(proxy) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)
    proxy.set(PASS)
    with connect(proxy) as connection:
        connection.sendall(HELLO)
        assert receive(connection, len(HELLO)) == HELLO


def test_nobody_behind_it_is_a_reset(place: Proxies, echo_port: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with connect(place.before(port)) as connection, pytest.raises(ConnectionResetError):
        connection.recv(1)


def test_a_slow_link_keeps_to_its_rate_and_delay(proxy: Proxy) -> None:
    rate, delay_s = SLOW.bytes_per_s, SLOW.delay_s
    assert rate is not None
    with connect(proxy) as connection:
        proxy.set(SLOW)
        data = os.urandom(int(rate * 0.5))
        started_s = time.monotonic()
        connection.sendall(data)
        assert receive(connection, len(data)) == data
        took_s = time.monotonic() - started_s
    assert 0.5 + 2 * delay_s <= took_s < 3.0


def test_a_slow_loris_gives_single_bytes(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(HELLO)
        assert receive(connection, len(HELLO)) == HELLO
        proxy.set(SLOW_LORIS)
        started_s = time.monotonic()
        connection.sendall(HELLO)
        assert connection.recv(100) == HELLO[:1]
        assert receive(connection, len(HELLO) - 1) == HELLO[1:]
        assert time.monotonic() - started_s >= 0.1 * len(HELLO)
        connection.sendall(bytes(1000))  # would take minutes
        proxy.set(PASS)
        assert len(receive(connection, 1000)) == 1000


CONNECTS = """
import socket, sys
connection = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
for line in sys.stdin:
    connection.sendall(line.encode())
    print(connection.recv(100).decode(), end="", flush=True)
"""


def test_one_process_is_cut_off_and_another_is_not(proxy: Proxy) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CONNECTS, str(proxy.port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process, connect(proxy) as connection:

        def ask() -> None:
            process.stdin.write("hello\n")
            process.stdin.flush()

        ask()
        assert process.stdout.readline() == "hello\n"
        assert process.pid in proxy.owners
        proxy.set(BLACK_HOLE, [process.pid])
        connection.sendall(HELLO)
        assert receive(connection, len(HELLO)) == HELLO
        ask()
        until(lambda: proxy.traffic[process.pid].up == 12, "the proxy to swallow the line", SOON_S)
        assert proxy.traffic[process.pid].down == 6
        proxy.set(PASS)
        assert process.stdout.readline() == "hello\n"
        process.stdin.close()


def test_a_trigger_is_pulled_once_when_so_many_bytes_have_come(proxy: Proxy) -> None:
    pulled: list[str] = []
    with connect(proxy) as connection:
        proxy.when_up(8, lambda: pulled.append("at 8"))
        forget = proxy.when_up(1, lambda: pulled.append("forgotten"))
        forget()
        connection.sendall(HELLO)
        assert receive(connection, len(HELLO)) == HELLO
        assert pulled == []
        connection.sendall(HELLO)
        assert receive(connection, len(HELLO)) == HELLO
        connection.sendall(HELLO)
        assert receive(connection, len(HELLO)) == HELLO
    assert pulled == ["at 8"]


def test_a_failing_trigger_is_heard_of(echo_port: int) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ExceptionGroup) as caught, proxies() as place:
        proxy = place.before(echo_port)
        proxy.when_up(1, fail)
        with connect(proxy) as connection:
            connection.sendall(HELLO)
            receive(connection, 1)
    assert caught.group_contains(ZeroDivisionError)


def test_the_owner_of_a_connection_that_is_gone_is_nobody() -> None:
    assert owner_of(1, 2) is None
