"""The chat page in a real browser, against a server that answers as a test wants. A real one is in `test_page_live`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from selenium.webdriver.common.keys import Keys

from protocol.errors import BlocksMissing
from tests.api.fake import CUT, GATE, FakeApi, hop, serving, trace
from tests.browser import Browser, chromium

LAST = "document.querySelector('#log article:last-child')"
IDLE = "document.querySelector('#stop').hidden"
HOPS = (
    "[...document.querySelectorAll('#hops .hop')].map(e => [e.querySelector('.blocks').textContent, e.dataset.state])"
)

FORMATTING = ("h3", "p", "br", "a", "strong", "pre", "code", "table", "thead", "tbody", "tr", "th", "td")

HOSTILE = """# Hello

<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2"> ![spy](http://127.0.0.1:9/spy.png)
<svg onload="window.hacked = 3"><style>body { display: none }</style></svg>
<a href="javascript:window.hacked = 4">one</a> [two](javascript:window.hacked%20=%205)
[three](data:text/html,<script>window.hacked=6</script>) [four](vbscript:x)
<iframe src="/"></iframe><form action="/x"><input name="body" autofocus onfocus="window.hacked = 7"></form>
<div id="log" class="trouble" style="position: fixed; inset: 0" onclick="window.hacked = 8">covered</div>
<math><mtext><table><mglyph><style><!--</style><img title="--&gt;&lt;img src=1 onerror=window.hacked=9&gt;">
<base href="http://127.0.0.1:9/"><meta http-equiv="refresh" content="0; url=/gone">

[fine](https://example.org/a) and **bold**

```js
const a = "<b>";
```

| x | y |
|---|---|
| 1 | 2<br>3 |
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeApi, str]]:
    fake = FakeApi()
    with serving(fake.app) as address:
        yield fake, address


def test_browsers_find_an_icon_before_they_have_read_the_page(server: tuple[FakeApi, str]) -> None:
    answer = httpx2.get(f"{server[1]}/favicon.ico", trust_env=False)
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("image/")


class Page:
    """The page, as a person uses it."""

    def __init__(self, browser: Browser, fake: FakeApi, address: str) -> None:
        self.browser = browser
        self.fake = fake
        self.address = address

    def open(self) -> None:
        self.browser.open(self.address)
        self.browser.until(
            "!document.querySelector('#model').disabled || document.querySelector('dialog[open]')", "models"
        )

    def ask(self, text: str, *script: Any) -> None:
        """Types and sends it; does not wait for the answer."""
        self.fake.script = list(script)
        self.browser.driver.find_element("id", "question").send_keys(text, Keys.ENTER)
        self.browser.until("document.querySelectorAll('article.user').length", "the question")

    def idle(self) -> None:
        self.browser.until(IDLE, "the end of an answer")

    def press(self, what: str) -> None:
        self.browser.driver.find_element("css selector", what).click()

    @property
    def last(self) -> str:
        return str(self.browser.evaluate(f"{LAST}.innerText"))


@pytest.fixture
def page(browser: Browser, server: tuple[FakeApi, str]) -> Iterator[Page]:
    fake, address = server
    fake.reset()
    browser.reset()
    browser.open(f"{address}/page/icon.svg")
    browser.evaluate("(localStorage.clear(), sessionStorage.clear())")
    browser.complaints()
    opened = Page(browser, fake, address)
    opened.open()
    yield opened
    fake.open_gate()
    assert browser.complaints() == []


CHAIN = (hop("Ada", "0:9", 4.0), hop("Bob", "9:15", 2.0), hop("Cleo", "15:24", 6.0))


def test_a_question_is_asked_and_answered(page: Page) -> None:
    page.ask("What is the capital of France?", trace(*CHAIN), "The capital is", " **Paris**.")
    page.idle()
    assert page.browser.evaluate(f"{LAST}.querySelector('strong').textContent") == "Paris"
    (asked,) = page.fake.asked
    assert asked["messages"] == [{"role": "user", "content": "What is the capital of France?"}]
    assert (asked["model"], asked["stream"], asked["temperature"]) == ("potluck-demo", True, 0)
    assert asked["potluck"] == {"trace": True}
    assert page.browser.evaluate(HOPS) == [
        ["blocks 0:9", "answers"],
        ["blocks 9:15", "answers"],
        ["blocks 15:24", "answers"],
    ]
    assert "4.0 ms" in page.browser.text
    assert "3 peers" in page.last
    page.ask("And of Norway?", "Oslo")
    page.idle()
    said = page.fake.asked[1]["messages"]
    assert [message["role"] for message in said] == ["user", "assistant", "user"]
    assert said[1]["content"] == "The capital is **Paris**."


def test_keys(page: Page) -> None:
    question = page.browser.driver.find_element("id", "question")
    question.send_keys("one", Keys.SHIFT + Keys.ENTER)
    question.send_keys("two")
    assert page.fake.asked == []
    page.ask("", "first", GATE, "never")
    assert page.fake.asked[0]["messages"][0]["content"] == "one\ntwo"
    page.browser.until(f"{LAST}.innerText.includes('first')", "the first words")
    question.send_keys(Keys.ESCAPE)
    page.idle()
    assert "Stopped." in page.last
    assert page.fake.hung_up.wait(5), "the server is told by the end of the connection"
    assert page.browser.evaluate("document.activeElement.id") == "question"


def test_stop_and_retry(page: Page) -> None:
    page.ask("Tell me", "one two", GATE, "three")
    page.browser.until(f"{LAST}.innerText.includes('one two')", "the first words")
    page.press("#stop")
    page.idle()
    assert page.browser.evaluate(f"{LAST}.getAttribute('aria-busy')") == "false"
    page.fake.script = ["All of it."]
    page.press("article:last-child .again")
    page.idle()
    assert page.last.startswith("All of it.")
    assert page.fake.asked[1]["messages"] == page.fake.asked[0]["messages"]
    assert page.browser.evaluate("document.querySelectorAll('article').length") == 2


def test_a_lost_peer_is_seen_while_it_is_replaced(page: Page) -> None:
    page.browser.look(reduced_motion=False)
    lost = "Bob is lost (the stream was reset); looking for others"
    page.ask(
        "Go on", trace(*CHAIN), "It is ",
        trace(CHAIN[0], CHAIN[2], reroutes=1, events=[lost]), GATE,
        trace(CHAIN[0], hop("Dora", "9:15", 3.0), CHAIN[2], reroutes=1, events=[lost, "found"]),
        "well.",
    )  # fmt: skip
    page.browser.until("document.querySelector('.hop[data-state=gap]')", "a gap")
    assert ["blocks 9:15", "lost"] in page.browser.evaluate(HOPS)
    assert lost in page.browser.text
    page.fake.open_gate()
    page.idle()
    assert page.last.startswith("It is well.")
    page.browser.until("!document.querySelector('.hop:not([data-state=answers])')", "the lost one gone")
    assert page.browser.evaluate("[...document.querySelectorAll('.hop .name')].map(e => e.innerText)") == [
        "Ada",
        "Dora",
        "Cleo",
    ]
    assert "1 reroute" in page.last


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ([BlocksMissing("blocks 9:15 have no peer")], "Blocks 9:15 have no peer."),
        (["some words", BlocksMissing("blocks 9:15 have no peer")], "Blocks 9:15 have no peer."),
        (["some words", CUT], "The connection ended before the answer did."),
    ],
    ids=["refused", "told", "cut"],
)
def test_an_error_is_a_sentence_and_can_be_tried_again(page: Page, script: list[Any], said: str) -> None:
    page.ask("Well?", *script)
    page.idle()
    assert said in page.last
    assert page.browser.evaluate("document.getElementById('said').textContent") == said, "it is spoken, too"
    if len(script) == 1:
        (complaint,) = page.browser.complaints()  # the console notes each refusal by itself
        assert "503" in complaint
    page.fake.script = ["Now it works."]
    page.press("article:last-child .again")
    page.idle()
    assert page.last.startswith("Now it works.")


def test_a_hostile_answer_is_text(page: Page) -> None:
    page.ask("Be nasty", *(HOSTILE[i : i + 40] for i in range(0, len(HOSTILE), 40)))
    page.idle()
    body = f"{LAST}.querySelector('.body')"
    assert page.browser.evaluate("window.hacked") is None
    tags = set(page.browser.evaluate(f"[...{body}.querySelectorAll('*')].map(e => e.localName)"))
    assert tags <= {*FORMATTING, "div"}
    names = set(page.browser.evaluate(f"[...{body}.querySelectorAll('*')].flatMap(e => e.getAttributeNames())"))
    assert names <= {"href", "target", "rel", "class", "tabindex", "role", "aria-label"}
    classes = page.browser.evaluate(f"[...{body}.querySelectorAll('[class]')].map(e => e.className)")
    assert set(classes) == {"wide"}
    assert "<script>window.hacked = 1</script>" in page.last, "it is shown as it was written"
    assert page.browser.evaluate(f"{body}.querySelectorAll('td br').length") == 1, "what is harmless is as it was meant"
    links = page.browser.evaluate(f"[...{body}.querySelectorAll('a[href]')].map(e => e.href)")
    assert links == ["http://127.0.0.1:9/spy.png", "https://example.org/a"]
    assert page.browser.evaluate(f"{body}.querySelector('pre').innerText").strip() == 'const a = "<b>";'
    fetched = page.browser.evaluate("performance.getEntriesByType('resource').map(e => e.name)")
    assert all(name.startswith(page.address) for name in fetched)
    page.ask("<b>me too</b>", "fine")
    page.idle()
    assert (
        page.browser.evaluate("[...document.querySelectorAll('article.user .body')].at(-1).innerText")
        == "<b>me too</b>"
    )


def test_scripts_of_others_do_not_run_even_if_they_get_through(page: Page) -> None:
    """Should the list of what is allowed ever have a hole, the page's policy is there still."""
    page.browser.evaluate(
        "(() => { try { document.body.innerHTML = '<p>x</p>' } catch (e) { window.refused = e.name } })()"
    )
    assert page.browser.evaluate("window.refused") == "TypeError"
    page.browser.evaluate(
        "(() => { const i = new Image(); i.src = 'https://example.org/x.png'; document.body.append(i) })()"
    )
    page.browser.until("document.images.length", "the image")
    complaints = page.browser.complaints()
    assert complaints
    assert all("Content Security Policy" in text or "TrustedHTML" in text for text in complaints)


def test_a_conversation_survives_a_reload(page: Page) -> None:
    page.ask("Who?", trace(*CHAIN), "Me", ", *myself*.")
    page.idle()
    page.open()
    assert len(page.browser.evaluate(HOPS)) == 3
    assert page.browser.evaluate("document.querySelectorAll('article').length") == 2
    assert page.browser.evaluate(f"{LAST}.querySelector('em').textContent") == "myself"
    page.ask("And?", "half of", GATE, "it")
    page.browser.until(f"{LAST}.innerText.includes('half of')", "the first words")
    page.open()
    assert "half of" in page.last
    page.press("#new")
    assert page.browser.evaluate("document.querySelectorAll('article').length") == 0
    page.press("#toast button")
    assert page.browser.evaluate("document.querySelectorAll('article').length") == 4
    page.press("#new")
    page.open()
    assert "Ask the swarm" in page.browser.text


def test_the_system_prompt_and_the_temperature(page: Page) -> None:
    page.press("#settings")
    page.browser.driver.find_element("id", "system").send_keys("Speak like a pirate.")
    page.browser.driver.find_element("id", "temperature").send_keys(Keys.ARROW_RIGHT * 7)
    page.press("#settings-dialog .main")
    page.open()
    page.ask("Hello", "Arr.")
    page.idle()
    (asked,) = page.fake.asked
    assert asked["messages"][0] == {"role": "system", "content": "Speak like a pirate."}
    assert asked["temperature"] == pytest.approx(0.7)


def test_the_models_to_choose_from(page: Page) -> None:
    page.fake.models = ["potluck-demo", "other/model-7b"]
    page.open()
    page.browser.driver.find_element("css selector", "#model option:last-child").click()
    page.ask("Hello", "Hi.")
    page.idle()
    assert page.fake.asked[0]["model"] == "other/model-7b"
    page.open()
    assert page.browser.evaluate("document.querySelector('#model').value") == "other/model-7b"


def test_a_key_is_asked_for_once(page: Page) -> None:
    page.fake.key = "sesame"
    page.open()
    for given, said in (("wrong", "Its operator has it"), ("sesame", "not the right one")):
        page.browser.until(f"document.querySelector('#key-dialog[open]')?.innerText.includes('{said}')", "a question")
        page.browser.driver.find_element("id", "api-key").send_keys(given, Keys.ENTER)
    page.browser.until("!document.querySelector('#model').disabled", "models")
    page.open()
    page.ask("Hello", "Hi.")
    page.idle()
    assert page.last.startswith("Hi.")
    assert page.browser.evaluate("JSON.stringify(localStorage)").count("sesame") == 0
    assert all("401" in complaint for complaint in page.browser.complaints())


LONG = "Supercalifragilistic" * 8


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_is_fit_to_look_at(page: Page, width: int, dark: bool) -> None:
    page.browser.look(width=width, height=760, dark=dark)
    page.open()
    assert page.browser.faults() == [], "the empty page"
    chain = trace(
        *CHAIN, hop("A name that somebody has chosen at great length", "20:24", 1.0, relayed=True), events=[LONG]
    )
    page.ask(f"Show {LONG}", chain, HOSTILE, f"\n\n`{LONG}` {LONG}\n\n```\n{LONG}\n```\n")
    page.idle()
    assert not page.browser.scrolls_sideways()
    assert page.browser.faults() == []
    background = page.browser.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert (sum(map(int, background[4:-1].split(","))) < 200) == dark
    page.press("#settings")
    assert page.browser.faults() == [], "settings"
    assert not page.browser.scrolls_sideways()


def test_all_can_be_reached_with_the_keyboard(page: Page) -> None:
    page.ask("Hello", trace(*CHAIN), "Hi.")
    page.idle()
    page.browser.evaluate("document.activeElement.blur()")
    seen = []
    for _ in range(16):
        page.browser.driver.switch_to.active_element.send_keys(Keys.TAB)
        seen.append(page.browser.evaluate("document.activeElement.id || document.activeElement.innerText"))
    assert {"model", "settings", "new", "log", "Copy", "Try again", "question"} <= set(seen)


def test_the_files_name_their_source_and_licence() -> None:
    folder = Path(__file__).parents[2] / "client" / "api" / "page" / "vendor"
    told = (folder / "README.md").read_text()
    for file in folder.glob("*.js"):
        assert file.name in told
        assert (folder / f"{file.name.split('.')[0]}.LICENSE").is_file()
