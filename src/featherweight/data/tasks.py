"""Zero-shot tasks: one JSON object a line, a question with choices or a passage with its last word."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.errors import RequestError

FIELDS = "query, choices and gold (the index of the right one), or context and continuation"


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        context: what the model reads.
        choices: what may follow it, beginning with white space; a single one is a word to be guessed.
        gold: the index of the right choice.
    """

    context: str
    choices: tuple[str, ...]
    gold: int


def read_task(path: str | Path) -> list[Item]:
    """The items of a .jsonl file, a line each: `query`, `choices` and `gold`, or `context` and `continuation`.

    Choices go after a space; after a query that begins with "Question:", on a line of its own behind "Answer:", the
    form in which ARC and PIQA are usually asked.

    Raises RequestError, with file and line, for a file that is missing or empty and a line that is neither.
    """
    path = Path(path)
    if not path.is_file():
        raise RequestError(f"there is no task file {path}: give a .jsonl file of {FIELDS}.")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise RequestError(f"the task file {path} is empty: give a .jsonl file of {FIELDS}.")
    return [_item(line, f"{path} line {number}") for number, line in enumerate(lines, 1)]


def _item(line: str, where: str) -> Item:
    try:
        found: Any = json.loads(line)
        if "continuation" in found:
            return Item(found["context"].rstrip(), (" " + found["continuation"].strip(),), 0)
        context, gold = found["query"].rstrip(), found["gold"]
        asked = "\nAnswer:" if context.startswith("Question:") else ""
        choices = tuple(" " + choice.strip() for choice in found["choices"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{where} is no item of a task ({error!r}): it needs {FIELDS}.") from error
    if not isinstance(gold, int) or not 0 <= gold < len(choices) or len(choices) < 2:
        raise RequestError(
            f"{where} has {len(choices)} choices and gold {gold!r}: give 2 or more, and the index of one."
        )
    return Item(context + asked, choices, gold)
