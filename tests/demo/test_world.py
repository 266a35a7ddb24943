"""The demo's world: right answers, splits that share nothing, and samples that do not change."""

import re
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from demo.facts import CAPITALS, COLOURS, OPPOSITES, WORDS
from demo.world import TASK_NAMES, TASKS, Question, Split, Task, function_words, phrasings, questions, stream


def operands(question: Question) -> str:
    """What a split is decided on: the answer, and for arithmetic the two numbers."""
    if question.task in ("addition", "subtraction"):
        return question.task + " ".join(sorted(re.findall(r"\d+", question.text)))
    return f"{question.task} {question.answer.lower()}"


def test_operands_of_the_splits_are_disjoint() -> None:
    facts = {"capitals", "colours", "opposites"}
    train = {operands(q) for q in islice(stream(2026, "train"), 20_000) if q.task not in facts}
    held_out = {operands(q) for q in questions(0, 2_000, "held_out") if q.task not in facts}
    assert not train & held_out


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_phrasings_of_the_splits_are_disjoint(task: Task) -> None:
    train, held_out = set(phrasings(task, "train")), set(phrasings(task, "held_out"))
    assert train and held_out and not train & held_out
    hidden = set(task.hidden_asks + task.hidden_orders)
    assert hidden and not hidden & {core for _, core, _ in train}


def test_held_out_phrasings_use_only_trained_words() -> None:
    def words(split: Split) -> set[str]:
        return {
            word
            for task in TASKS
            for phrasing in phrasings(task, split)
            for word in re.findall(r"[a-z]+", "".join(phrasing).lower())
        }

    assert words("held_out") <= words("train")


def test_answers_are_right() -> None:
    for question in questions(3, 1_500, "held_out"):
        text, answer = question.text.lower(), question.answer
        numbers = [int(n) for n in re.findall(r"\d+", text)]
        match question.task:
            case "addition":
                assert int(answer) == sum(numbers)
            case "subtraction":
                a, b = numbers[::-1] if "from" in text else numbers
                assert int(answer) == a - b
            case "spelling":
                assert answer.replace("-", "") in question.text and set(answer[1::2]) == {"-"}
            case "sorting":
                words = answer.split(", ")
                assert words == sorted(words) and all(word in text for word in words)
            case "copying":
                assert answer in question.text
            case _:
                facts = {"capitals": CAPITALS, "colours": COLOURS, "opposites": OPPOSITES}[question.task]
                assert any(name.lower() in text and answer == known for name, known in facts.items())


@given(st.integers(0, 10_000))
def test_samples_are_reproducible_different_and_balanced(seed: int) -> None:
    sample = questions(seed, 24, "held_out")
    assert sample == questions(seed, 24, "held_out")
    assert len({question.text for question in sample}) == 24
    assert {question.task for question in sample} == set(TASK_NAMES)


def test_facts_do_not_use_function_words() -> None:
    content = {*WORDS, *(w for d in (CAPITALS, OPPOSITES) for pair in d.items() for w in pair), *COLOURS.values()}
    assert not {word for text in content for word in text.split()} & set(function_words())
    assert len(set(WORDS)) == len(WORDS) >= 200
