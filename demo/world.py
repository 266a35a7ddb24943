"""The small world that the demo model is trained and examined on: questions with exactly one right answer.

Held out from training, by a hash and so for good: a tenth of the operands (number pairs, words to spell, word sets,
strings), a fifth of the phrasings (prefix x core x suffix) and some cores altogether. A held-out question has a
held-out phrasing *and*, where its task has operands, held-out operands. Facts cannot be held out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Literal
from zlib import crc32

from demo.facts import CAPITALS, COLOURS, OPPOSITES, WORDS

Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Question:
    """One question of a user and its only right answer."""

    text: str
    answer: str
    task: str


@dataclass(frozen=True)
class Fill:
    """What goes into the slots of a phrasing, and the answer that follows."""

    slots: dict[str, str]
    answer: str


@dataclass(frozen=True)
class Task:
    """A kind of question: `asks` end like a question, `orders` like a command, `hidden` cores are never trained."""

    name: str
    weight: float
    asks: tuple[str, ...]
    orders: tuple[str, ...]
    hidden_asks: tuple[str, ...]
    hidden_orders: tuple[str, ...]
    fill: Callable[[Random, Split], Fill]
    names: bool = False  # the slots are names, whose case a user may change without changing the answer


# An empty prefix or suffix stands twice because users leave them out more often.
ASK_PREFIXES = ("", "", "Hi, ", "Hello, ", "Tell me, ", "Please tell me, ", "Can you tell me, ", "Quick question: ",
                "Next question: ", "Now, ")  # fmt: skip
ASK_SUFFIXES = ("?", "?", "", ", please?", " please?", "? Thanks.", "? Thank you.")
ORDER_PREFIXES = ("", "", "Please ", "Can you ", "Could you ", "Now ", "Next, ", "Hi, please ", "Hello, ",
                  "Now please ")  # fmt: skip
ORDER_SUFFIXES = (".", "", "", ", please.", " please", " now.", ". Thanks.", ". Thank you.")


def _is_held_out(key: str, one_in: int = 10) -> bool:
    return crc32(key.encode()) % one_in == 0


def _drawn(draw: Callable[[], tuple[str, Fill]], split: Split) -> Fill:
    """The first drawn filling whose key belongs to the split."""
    while True:
        key, fill = draw()
        if _is_held_out(key) == (split == "held_out"):
            return fill


def _fact(facts: dict[str, str]) -> Callable[[Random, Split], Fill]:
    names = tuple(facts)

    def fill(rng: Random, split: Split) -> Fill:
        name = rng.choice(names)
        return Fill({"x": name}, facts[name])

    return fill


def _operand(rng: Random) -> int:
    return rng.randrange(10) if rng.random() < 0.15 else rng.randrange(100)


def _sum(rng: Random, split: Split) -> Fill:
    def draw() -> tuple[str, Fill]:
        a, b = _operand(rng), _operand(rng)
        # a + b and b + a are one question: neither may give the other away.
        return f"{min(a, b)}+{max(a, b)}", Fill({"a": str(a), "b": str(b)}, str(a + b))

    return _drawn(draw, split)


def _difference(rng: Random, split: Split) -> Fill:
    def draw() -> tuple[str, Fill]:
        a, b = _operand(rng), _operand(rng)
        if a < b and rng.random() < 0.5:  # fewer negative results than chance gives
            a, b = b, a
        return f"{max(a, b)}-{min(a, b)}", Fill({"a": str(a), "b": str(b)}, str(a - b))

    return _drawn(draw, split)


def _made_up_word(rng: Random) -> str:
    endings = ("", "", "n", "r", "l", "s")
    parts = range(rng.randint(2, 4))
    return "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(endings) for _ in parts)


def _spelling(rng: Random, split: Split) -> Fill:
    def draw() -> tuple[str, Fill]:
        word = _made_up_word(rng) if rng.random() < 0.4 else rng.choice(WORDS)
        shown = word.capitalize() if rng.random() < 0.15 else word
        return f"spell {word}", Fill({"x": shown}, "-".join(shown))

    return _drawn(draw, split)


def _sorting(rng: Random, split: Split) -> Fill:
    def draw() -> tuple[str, Fill]:
        size = rng.randint(2, 4)
        words = rng.sample(WORDS, size)
        while len({word[0] for word in words}) < size:  # the first letters decide
            words = rng.sample(WORDS, size)
        joined = (" and " if size == 2 and rng.random() < 0.3 else rng.choice((", ", ", ", " "))).join(words)
        return "sort " + " ".join(sorted(words)), Fill({"x": joined}, ", ".join(sorted(words)))

    return _drawn(draw, split)


def _copying(rng: Random, split: Split) -> Fill:
    def draw() -> tuple[str, Fill]:
        kind = rng.random()
        if kind < 0.4:
            text = " ".join(rng.choice(WORDS) for _ in range(rng.randint(1, 5)))
        elif kind < 0.6:
            text = " ".join(_made_up_word(rng) for _ in range(rng.randint(1, 3)))
        else:
            letters = rng.choice(("abcdefghijklmnopqrstuvwxyz", "abcdefghijklmnopqrstuvwxyz0123456789", "0123456789",
                                  "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"))  # fmt: skip
            text = "".join(rng.choice(letters) for _ in range(rng.randint(3, 14)))
        return f"copy {text}", Fill({"x": text}, text)

    return _drawn(draw, split)


TASKS: tuple[Task, ...] = (
    Task("capitals", 0.10,
         ("what is the capital of {x}", "which city is the capital of {x}", "do you know the capital of {x}",
          "what is the capital city of {x}"),
         ("name the capital of {x}", "tell me the capital of {x}", "give me the capital of {x}",
          "name the capital city of {x}"),
         ("what city is the capital of {x}",), ("give me the capital city of {x}",), _fact(CAPITALS), names=True),
    Task("colours", 0.07,
         ("what colour is {x}", "what color is {x}", "which colour is {x}", "what is the colour of {x}",
          "what is the color of {x}", "do you know the colour of {x}"),
         ("name the colour of {x}", "tell me the color of {x}", "tell me the colour of {x}",
          "give me the color of {x}"),
         ("which color is {x}",), ("give me the colour of {x}",), _fact(COLOURS)),
    Task("opposites", 0.08,
         ("what is the opposite of {x}", "which word is the opposite of {x}", "what word is the opposite of {x}"),
         ("name the opposite of {x}", "tell me the opposite of {x}", "give me the opposite of {x}"),
         ("do you know the opposite of {x}",), ("name the word opposite of {x}",), _fact(OPPOSITES)),
    Task("addition", 0.17,
         ("what is {a} + {b}", "what is {a} plus {b}", "how much is {a} plus {b}", "what is the sum of {a} and {b}",
          "{a} + {b}", "{a}+{b}", "{a} plus {b}", "what is {a}+{b}"),
         ("compute {a} + {b}", "add {a} and {b}", "calculate {a} + {b}", "compute {a} plus {b}",
          "tell me the sum of {a} and {b}", "compute {a}+{b}"),
         ("how much is {a} + {b}",), ("calculate {a} plus {b}",), _sum),
    Task("subtraction", 0.18,
         ("what is {a} - {b}", "what is {a} minus {b}", "how much is {a} minus {b}", "{a} - {b}", "{a}-{b}",
          "{a} minus {b}", "what is {a}-{b}"),
         ("compute {a} - {b}", "subtract {b} from {a}", "calculate {a} - {b}", "compute {a} minus {b}",
          "take {b} from {a}", "compute {a}-{b}"),
         ("how much is {a} - {b}",), ("calculate {a} minus {b}",), _difference),
    Task("spelling", 0.10,
         ("how do you spell {x}", "how do you spell the word {x}", "what are the letters of {x}"),
         ("spell {x}", "spell the word {x}", "spell out {x}", "give me the letters of {x}", "spell this word: {x}"),
         ("what are the letters of the word {x}",), ("spell out the word {x}",), _spelling),
    Task("sorting", 0.17,
         ("what is the order of {x}", "what is the alphabetical order of {x}"),
         ("sort {x}", "sort these words: {x}", "sort the words {x}", "put these words in order: {x}",
          "order these words: {x}", "put these words in alphabetical order: {x}", "put {x} in order", "sort: {x}"),
         ("what is the alphabetical order of these words: {x}",), ("put the words {x} in alphabetical order",),
         _sorting),
    Task("copying", 0.13,
         (),
         ("repeat {x}", "repeat after me: {x}", "copy this: {x}", "say {x}", "repeat this: {x}", "copy {x}",
          "say: {x}", "say after me: {x}", "repeat: {x}"),
         (), ("copy after me: {x}", "say this: {x}"), _copying),
)  # fmt: skip
TASK_NAMES: tuple[str, ...] = tuple(task.name for task in TASKS)


@cache
def phrasings(task: Task, split: Split) -> tuple[tuple[str, str, str], ...]:
    """All (prefix, core, suffix) of a task in one split."""
    hidden = task.hidden_asks + task.hidden_orders
    found = []
    for cores, prefixes, suffixes in (
        (task.asks + task.hidden_asks, ASK_PREFIXES, ASK_SUFFIXES),
        (task.orders + task.hidden_orders, ORDER_PREFIXES, ORDER_SUFFIXES),
    ):
        for core in cores:
            for prefix in prefixes:
                for suffix in suffixes:
                    held_out = core in hidden or _is_held_out("|".join((prefix, core, suffix)), one_in=5)
                    if held_out == (split == "held_out"):
                        found.append((prefix, core, suffix))
    return tuple(found)


def function_words() -> tuple[str, ...]:
    """Every word of the phrasings in lower case: the tokenizer makes each of them one token."""
    texts = [*ASK_PREFIXES, *ASK_SUFFIXES, *ORDER_PREFIXES, *ORDER_SUFFIXES, "a an and"]
    for task in TASKS:
        texts += task.asks + task.orders + task.hidden_asks + task.hidden_orders
    words = re.findall(r"[a-z]+", re.sub(r"\{\w\}", " ", " ".join(texts)).lower())
    return tuple(sorted(set(words)))


def draw(rng: Random, split: Split, task: Task | None = None) -> Question:
    """One random question of the split, of the given task or a random one."""
    task = task or rng.choices(TASKS, [task.weight for task in TASKS])[0]
    prefix, core, suffix = rng.choice(phrasings(task, split))
    fill = task.fill(rng, split)
    slots, style = fill.slots, rng.random()
    if style < 0.3:  # all lower case, names too
        prefix, suffix = prefix.lower(), suffix.lower()
        if task.names:
            slots = {slot: text.lower() for slot, text in slots.items()}
    elif style < 0.85:  # sentence case; else a user who leaves the first word small
        prefix, core = (prefix, core) if prefix else ("", core[0].upper() + core[1:])
    else:
        prefix = prefix[:1].lower() + prefix[1:]
    return Question(prefix + core.format(**slots) + suffix, fill.answer, task.name)


def stream(seed: int, split: Split) -> Iterator[Question]:
    """Questions without end, tasks mixed by their weights."""
    rng = Random(f"{split} {seed}")
    while True:
        yield draw(rng, split)


def questions(seed: int, n: int, split: Split, task: str | None = None) -> list[Question]:
    """`n` different questions of a split: of one task, or of all tasks in equal shares (then shuffled)."""
    rng = Random(f"{split} {seed} sample")
    chosen = [t for t in TASKS if task in (None, t.name)]
    found: dict[str, Question] = {}
    while len(found) < n:
        question = draw(rng, split, chosen[len(found) % len(chosen)])
        found.setdefault(question.text, question)
    sample = list(found.values())
    rng.shuffle(sample)
    return sample
