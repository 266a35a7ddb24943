"""The page over a real swarm: what it answers, and what people see in a browser."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from dashboard.metrics import families
from tests.browser import Browser, chromium
from tests.dashboard.world import World, world
from tests.processes import until

SOON_S = 5.0  # a peer is lost: so soon the grid has to show it
IP = re.compile(r"127\.0\.0\.1|203\.0\.113|fe80:|(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.])")
SENTENCE = "potluck-demo: all 24 blocks served, weakest 12:16 by one peer; 41 tokens/s free"
PAGES = ("", "metrics", "health", "api/v1/", "api/v1/swarm", "api/v1/events", "api/v1/history?model=" + "f" * 32)


@pytest.fixture(scope="module")
def swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with world(tmp_path_factory.mktemp("world")) as found:
        until(lambda: answering(found) == len(found.peers), "answers of all peers")
        yield found


@pytest.fixture(scope="module")
def one_browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def browser(one_browser: Browser) -> Browser:
    one_browser.reset()
    return one_browser


def get(swarm: World, path: str) -> httpx2.Response:
    return httpx2.get(f"{swarm.url}{path}", trust_env=False)


def found_by(swarm: World) -> dict[str, Any]:
    data: dict[str, Any] = get(swarm, "api/v1/swarm").json()
    return data


def answering(swarm: World) -> int:
    return sum(bool(peer["answers"]) for model in found_by(swarm)["models"] for peer in model["peers"])


# ---------------------------------------------------------------- for programs


def test_the_page_begins_with_the_sentence(swarm: World) -> None:
    until(lambda: "weakest 12:16" in get(swarm, "").text, "the sentence")
    page = get(swarm, "").text
    assert SENTENCE in page
    assert page.index(SENTENCE) < page.index("<table")


def test_nothing_tells_an_address(swarm: World) -> None:
    for path in PAGES:
        answer = get(swarm, path)
        assert not IP.search(answer.text), path
        assert not IP.search(str(answer.headers)), path
    with httpx2.stream("GET", f"{swarm.url}api/v1/live", trust_env=False) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        assert first.startswith("data: <section")
        said = [first, *(line for line, _ in zip(lines, range(200), strict=False) if line)]
    assert not IP.search("\n".join(said))


def test_metrics_are_parsed_and_cheap(swarm: World) -> None:
    text = get(swarm, "metrics").text
    found = {family.name: family for family in text_string_to_metric_families(text)}
    assert {family.name for family in families()} == set(found)
    for family in families():
        assert (found[family.name].type, found[family.name].documentation) == (family.type, family.documentation)
    (served,) = found["potluck_swarm_blocks_served"].samples
    assert (served.value, served.labels["model"]) == (24.0, "potluck-demo")
    assert len(found["potluck_swarm_peer_answers"].samples) == len(swarm.peers)
    with httpx2.Client(trust_env=False) as client:
        times_s = []
        for _ in range(10):
            started_s = time.perf_counter()
            client.get(f"{swarm.url}metrics").raise_for_status()
            times_s.append(time.perf_counter() - started_s)
    assert min(times_s) < 0.02


def test_health_is_for_load_balancers(swarm: World) -> None:
    answer = get(swarm, "health")
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")


def test_browsers_find_an_icon_before_they_have_read_the_page(swarm: World) -> None:
    answer = get(swarm, "favicon.ico")
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("image/")


def test_browsers_are_told_to_load_nothing_from_elsewhere(swarm: World) -> None:
    for path in ("", "static/page.js", "api/v1/live-not", "metrics"):
        headers = get(swarm, path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers
    page = get(swarm, "").text
    assert not re.search(r'(?:src|href)="(?!/|#)', page), "third parties"
    assert not re.search(r"<script(?! src)|<style|\sstyle=|\son\w+=\"", page), "inline"


def test_the_history_has_columns(swarm: World) -> None:
    def history() -> dict[str, Any]:
        data: dict[str, Any] = get(swarm, f"api/v1/history?model={'f' * 32}&hours=1").json()
        return data

    until(lambda: 24 in history()["blocks_served"], "a sample")
    found = history()
    assert {len(found[name]) for name in ("at", "peers", "free_tokens_per_s")} == {len(found["at"])}
    assert get(swarm, "api/v1/history?hours=1e9").status_code == 400
    assert get(swarm, "api/v1/history?hours=nan").status_code == 400


def test_what_peers_say_of_themselves_is_marked(swarm: World) -> None:
    claims = [peer["claims"] for peer in found_by(swarm)["models"][0]["peers"]]
    assert {claim["tokens_served"] for claim in claims} == {1_234_567}
    assert "zoe@example.org" in {claim["contact"] for claim in claims}


# ---------------------------------------------------------------- for people


def test_sentence_and_grid_need_no_javascript(swarm: World, browser: Browser) -> None:
    browser.scripts(False)
    browser.open(swarm.url)
    assert browser.driver.find_element("css selector", "h1").text == SENTENCE
    rows = browser.driver.find_elements("css selector", ".grid tbody tr")
    assert len(rows) == len(swarm.peers)
    assert "■" * 12 in rows[0].text.replace("\n", "")
    assert not browser.driver.find_elements("css selector", "canvas")
    assert "need JavaScript" in browser.text
    assert browser.complaints() == []


def test_the_page_is_live_and_shows_a_lost_peer_soon(swarm: World, browser: Browser) -> None:
    browser.open(swarm.url)
    browser.until("document.getElementById('line').textContent === 'live'", "live")
    assert browser.evaluate("document.querySelectorAll('i.silent').length") == 0
    swarm.call(swarm.peers[2].kill())
    killed_s = time.monotonic()
    browser.until("document.querySelectorAll('.grid tbody i.silent').length === 12", "a silent peer", SOON_S)
    assert time.monotonic() - killed_s < SOON_S
    assert "12:16 by no peer that answers" in browser.driver.find_element("css selector", "h1").text
    assert "does not answer" in browser.driver.find_element("id", "events").text
    assert "cannot be reached." in browser.driver.find_element("id", "reach").text
    assert not IP.search(browser.driver.page_source)
    swarm.call(swarm.peers[2].start())
    browser.until("document.querySelectorAll('i.silent').length === 0", "the peer again")
    assert browser.complaints() == []


def test_strangers_words_are_text(swarm: World, browser: Browser) -> None:
    browser.open(swarm.url)
    names = [cell.text for cell in browser.driver.find_elements("css selector", ".grid tbody th")]
    assert any(name.startswith("<img src=x onerror=alert(1)>") for name in names)
    assert browser.evaluate("document.querySelectorAll('main img').length") == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_and_has_no_grave_fault(swarm: World, browser: Browser, width: int, dark: bool) -> None:
    browser.look(width=width, height=740, dark=dark)
    browser.open(swarm.url)
    browser.until("document.querySelectorAll('canvas').length === 3", "charts")
    assert not browser.scrolls_sideways()
    ground = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(int(part) for part in re.findall(r"\d+", ground)[:3]) > 3 * 128
    assert light is not dark
    assert browser.faults() == []
    assert browser.complaints() == []


def test_it_is_worked_with_keys(swarm: World, browser: Browser) -> None:
    browser.open(swarm.url)
    browser.until("!document.querySelector('.ranges').hidden", "the ranges")
    focused = []
    for _ in range(20):
        ActionChains(browser.driver).send_keys(Keys.TAB).perform()
        focused.append(browser.evaluate("document.activeElement.textContent.trim()"))
        if focused[-1] == "week":
            break
    assert focused[0] == "To the state of the swarm"
    assert browser.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    ActionChains(browser.driver).send_keys(Keys.ENTER).perform()
    browser.until("document.querySelector('[data-hours=\"168\"]').getAttribute('aria-pressed') === 'true'", "the week")
    swarm.call(swarm.peers[3].kill())
    browser.until("document.querySelectorAll('.grid tbody i.silent').length === 8", "a change of the page")
    assert browser.evaluate("document.activeElement.textContent") == "week", "news do not take the focus away"
    swarm.call(swarm.peers[3].start())
    browser.until("document.querySelectorAll('i.silent').length === 0", "the peer again")


def test_glyphs_are_printed(swarm: World, browser: Browser) -> None:
    browser.open(swarm.url)
    browser.print_preview()
    style = "getComputedStyle(document.querySelector('.grid tbody i.serving'))"
    assert browser.evaluate(f"{style}.color") == "rgb(0, 0, 0)"
    assert browser.evaluate(f"{style}.backgroundColor") == "rgba(0, 0, 0, 0)"
