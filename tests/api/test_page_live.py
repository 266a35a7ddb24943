"""The chat page in a real browser before a real gateway: real peers answer, and one of them is killed on the way."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from selenium.webdriver.common.keys import Keys

from slicing.ragged import RaggedSpan
from tests.api.local import Local, local
from tests.api.test_page import IDLE, LAST
from tests.browser import Browser, chromium

STEP_S = 0.08  # of each peer: slow enough to be watched
HOPS = "[...document.querySelectorAll('.hop[data-state=answers] .blocks')].map(e => e.textContent)"
PEERS = "[...document.querySelectorAll('.hop[data-state=answers] .name')].map(e => e.title)"
FOREVER_S = 30.0


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def running() -> Iterator[Local]:
    """Three peers, of which two have the same blocks."""
    with local("0:12", "12:24", "12:24", api_key=("sesame",)) as served:
        yield served


@pytest.fixture
def page(browser: Browser, running: Local) -> Iterator[Browser]:
    browser.reset()
    browser.open(f"{running.url}/page/icon.svg")
    browser.evaluate("(localStorage.clear(), sessionStorage.clear())")
    browser.complaints()
    browser.open(running.url)
    browser.until("document.querySelector('#key-dialog').open", "the question for a key")
    browser.driver.find_element("id", "api-key").send_keys("sesame", Keys.ENTER)
    browser.until("document.querySelector('#model').value === 'potluck-demo'", "the model")
    assert all("401" in complaint for complaint in browser.complaints()), "that it was asked for is noted"
    yield browser
    assert browser.complaints() == []
    running.settles()


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peers take their time for each step."""
    run = RaggedSpan.run

    def slow(self: RaggedSpan, *arguments: Any, **more: Any) -> Any:
        time.sleep(STEP_S)
        return run(self, *arguments, **more)

    monkeypatch.setattr(RaggedSpan, "run", slow)


def ask(page: Browser, text: str) -> None:
    page.driver.find_element("id", "question").send_keys(text, Keys.ENTER)
    page.until("document.querySelector('article.assistant:last-child')", "an answer to come")


def answer(page: Browser) -> str:
    page.until(IDLE, "the end of the answer", FOREVER_S)
    return str(page.evaluate(f"{LAST}.querySelector('.body').innerText")).strip()


def test_a_question_is_answered_and_its_chain_is_drawn(page: Browser) -> None:
    ask(page, "What is the capital of France?")
    assert answer(page) == "Paris"
    assert page.evaluate(HOPS) == ["blocks 0:12", "blocks 12:24"]
    assert page.evaluate("[...document.querySelectorAll('.hop .ms')].every(e => /^[0-9.]+ ms$/.test(e.textContent))")
    ask(page, "What is 27 + 58?")
    assert answer(page) == "85"


@pytest.mark.usefixtures("slowly")
def test_an_answer_is_stopped_and_asked_for_again(page: Browser, running: Local) -> None:
    ask(page, "Spell cauliflower.")
    page.until(f"{LAST}.innerText.includes('c-a')", "the first letters")
    page.driver.find_element("id", "question").send_keys(Keys.ESCAPE)
    page.until(IDLE, "an end")
    assert "Stopped." in page.evaluate(f"{LAST}.innerText")
    running.settles()  # the peers are free again, long before the answer would have ended
    page.driver.find_element("css selector", "article:last-child .again").click()
    assert answer(page) == "-".join("cauliflower")


@pytest.mark.usefixtures("slowly")
def test_a_peer_is_killed_in_the_middle_of_an_answer(page: Browser, running: Local) -> None:
    ask(page, "Spell cauliflower.")
    page.until(f"{LAST}.innerText.includes('c-a')", "the first letters")
    before = page.until(f"{PEERS}.length && {PEERS}", "a chain")
    (victim,) = (host for host in running.hosts if host.identity.peer_id == before[1])
    running.lose(victim)
    killed_s = time.monotonic()
    page.until(f"!JSON.stringify({PEERS}).includes('{victim.identity.peer_id}')", "another chain", 5.0)
    assert time.monotonic() - killed_s < 5.0
    assert answer(page) == "-".join("cauliflower"), "whoever asked does not see it in the answer"
    assert page.evaluate(HOPS) == ["blocks 0:12", "blocks 12:24"]
    assert "is lost" in page.evaluate("document.querySelector('#events').innerText")
    assert "1 reroute" in page.evaluate(f"{LAST}.innerText")
