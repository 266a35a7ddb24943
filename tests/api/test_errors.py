"""Errors in OpenAI's form: each with its status, its type, and the parameter that is to blame."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import openai
import pytest
from click.testing import CliRunner

from client.api.config import ApiConfig
from client.api.errors import BadRequest, Busy, body_of, headers_of, status_of
from client.api.server import _listener
from client.cli import cli
from protocol.errors import BlocksMissing, ConfigError, ModelError, PeerFull, PotluckError, WireError
from tests.api.local import DEMO, Local

CHAT = "/v1/chat/completions"
MESSAGES: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry"),
    [
        (BadRequest("no", param="n"), 400, "invalid_request_error", None),
        (BadRequest("no", status=404), 404, "invalid_request_error", None),
        (ModelError("no"), 400, "invalid_request_error", None),
        (Busy("later", retry_after_s=2.1), 429, "rate_limit_error", "3"),
        (BlocksMissing("blocks 0:3 have no peer"), 503, "server_error", "2"),
        (PeerFull("full", retry_after_s=7.0), 503, "server_error", "7"),
        (WireError("nonsense"), 500, "server_error", None),
    ],
)
def test_the_tree_in_http(error: PotluckError, status: int, kind: str, retry: str | None) -> None:
    assert status_of(error) == status
    assert body_of(error)["error"]["type"] == kind
    assert body_of(error)["error"]["message"] == error.message
    assert headers_of(error).get("Retry-After") == retry


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "invalid_value"),
        ({"temprature": 1}, "temprature", "unknown_parameter"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"top_logprobs": 2}, None, "invalid_value"),
        ({"max_tokens": 5000}, "messages", "context_length_exceeded"),
        ({"logit_bias": {"100000": 1}}, "logit_bias", "invalid_value"),
        ({"stop": ""}, "stop", "invalid_value"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "invalid_value"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "wizard"}}}},
            "response_format",
            "invalid_schema",
        ),
    ],
)
def test_bad_requests(served: Local, changes: dict[str, Any], param: str | None, code: str) -> None:
    reply = served.http().post(CHAT, json={"model": DEMO, "messages": MESSAGES} | changes)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"] or "").startswith(param or ""), error
    assert error["code"] == code
    assert error["message"]


def test_what_is_no_json(served: Local) -> None:
    reply = served.http().post(CHAT, content=b"{", headers={"Content-Type": "application/json"})
    assert reply.status_code == 400
    assert reply.json()["error"]["code"] == "invalid_json"


def test_a_page_of_another_site_cannot_ask(served: Local) -> None:
    """Browsers send such a body unasked; JSON they announce first, and that is not answered."""
    reply = served.http().post(CHAT, content=b'{"messages": []}', headers={"Content-Type": "text/plain"})
    assert reply.status_code == 400


def test_unknown_models_and_paths(served: Local) -> None:
    client = served.openai()
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-5")
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=DEMO, input="x")
    assert [model.id for model in client.models.list()] == [DEMO]
    assert client.models.retrieve(DEMO).id == DEMO


def test_too_many_at_once(served: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    client = served.openai()
    with client.chat.completions.create(
        model=DEMO, messages=MESSAGES, stream=True, max_tokens=1000, temperature=2.0, logit_bias=_endless(served)
    ) as stream:
        next(stream)
        monkeypatch.setattr(served.gateway.answers, "_most", 1)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model=DEMO, messages=MESSAGES)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) >= 1
    served.settles()


def _endless(served: Local) -> dict[str, int]:
    return {str(end): -100 for end in served.gateway.prompts.ends}


def test_blocks_without_a_peer(served: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    """`/health` says which; requests wait for a while, then fail with 503."""
    http = served.http()
    assert http.get("/health").json() == {"status": "ok", "model": DEMO, "missing": []}
    lost = served.reader.hosts.pop()
    try:
        reply = http.get("/health")
        assert reply.status_code == 503
        assert reply.json()["missing"] == ["12:24"]
        assert int(reply.headers["retry-after"]) >= 1
        impatient = served.gateway.model.blocks._config
        object.__setattr__(impatient, "wait_s", 0.3)
        for stream in (False, True):
            with pytest.raises(openai.InternalServerError, match="12:24") as caught:
                served.openai().chat.completions.create(model=DEMO, messages=MESSAGES, stream=stream)
            assert caught.value.status_code == 503
            assert caught.value.code == "blocks-missing"
    finally:
        served.reader.hosts.append(lost)
        object.__setattr__(served.gateway.model.blocks._config, "wait_s", 20.0)
    assert http.get("/health").status_code == 200


def test_a_fault_of_ours_is_500_without_details(served: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(served.gateway.model, "generate", broken)
    with pytest.raises(openai.InternalServerError) as caught:
        served.openai().chat.completions.create(model=DEMO, messages=MESSAGES)
    assert caught.value.status_code == 500
    assert "secret" not in str(caught.value)


def test_keys_are_wanted_everywhere_but_for_health(served: Local) -> None:
    with served.another(api_key=("first", "second")) as guarded:
        http = guarded.http()
        assert http.get("/health").status_code == 200
        assert http.get("/").status_code == 200, "the page; all that it asks for wants the key"
        for path in ("/metrics", "/v1/models", "/docs", "/nowhere"):
            assert http.get(path).status_code == 401, path
        reply = http.get("/v1/models", headers={"Authorization": "Bearer third"})
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"].startswith("Bearer")
        assert http.get("/docs", headers={"Accept": "text/html"}).headers["www-authenticate"].startswith("Basic")
        assert http.get("/v1/models", auth=("anyone", "second")).status_code == 200
        for key in ("first", "second"):
            assert guarded.openai(api_key=key).models.list().data
        for value in (b"Bearer none", b"Bearer", b"Bearer fir", "Bearer ünicode".encode(), b"Basic ????", b"first"):
            assert http.get("/v1/models", headers={"Authorization": value}).status_code == 401


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--port", "70000"], "--port must be from 0 to 65535"),
        (["--parallel", "0"], "--parallel must be at least 1"),
        (["--queue", "-1"], "--queue must not be negative"),
        (["--api-key", ""], "--api-key is empty"),
        (["--api-key", "a\nb"], "printable ASCII"),
        (["--keep-alive-s", "0"], "--keep-alive-s must be positive"),
    ],
)
def test_wrong_flags_are_told_in_a_sentence(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(cli, ["api", *arguments])
    assert result.exit_code == 2
    assert said in result.output
    assert "Traceback" not in result.output


def test_a_port_that_is_taken_is_a_mistake_of_the_user() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ApiConfig(port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=f"cannot listen at 127.0.0.1, port {config.port}"):
            _listener(config)


async def test_a_reader_that_goes_is_noticed() -> None:
    """Work for it is cancelled."""
    from client.api.streaming import ReaderGone, unless_gone

    cancelled = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    class Gone:
        async def receive(self) -> dict[str, str]:
            await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

    with pytest.raises(ReaderGone):
        await unless_gone(Gone(), work())  # type: ignore[arg-type]
    assert cancelled.is_set()
