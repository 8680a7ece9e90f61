"""Answers out of texts, right or wrong: the same code for teachers' traces and for the student's evaluation."""

import re
from dataclasses import dataclass
from decimal import Decimal

# A sign counts only where it does not join two words or numbers, as in "20-7".
_NUMBER = re.compile(
    r"(?:(?<![\w)\]])[-+])?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
)

# What opens and closes braces; an escaped one, as in \{1, 2\}, is text.
_BRACE = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True)
class Verdict:
    """``correct``: whether ``extracted``, the answer found in the text (None: none found), equals the known answer."""

    correct: bool
    extracted: str | None


def verify_exact(response: str, answer: str) -> Verdict:
    r"""The verifier ``exact``: the last balanced ``\boxed{…}``, else the last number, against the known answer.

    Args:
        response: the text after the reasoning; a guess inside the reasoning must not count.
        answer: the known answer. It equals the extracted one as text (spaces and a closing full stop aside) or as a
            number (``1,000`` is ``1000.0``).
    """
    extracted = last_boxed(response)
    if extracted is None:
        extracted = last_number(response)
    if extracted is None:
        return Verdict(False, None)
    return Verdict(_same(extracted, answer), extracted)


def last_boxed(text: str) -> str | None:
    r"""Content of the last ``\boxed{…}`` whose braces balance; None if there is none."""
    last: tuple[int, int] | None = None
    open_braces: list[int | None] = []  # where a box's content begins; None for any other brace
    for match in _BRACE.finditer(text):
        if match.group().startswith(r"\boxed"):
            open_braces.append(match.end())
        elif match.group() == "{":
            open_braces.append(None)
        elif match.group() == "}" and open_braces:
            begin = open_braces.pop()
            if begin is not None and (last is None or begin > last[0]):
                last = begin, match.start()
    return None if last is None else text[last[0] : last[1]].strip()


def last_number(text: str) -> str | None:
    """The last number of a text, as written; None if there is none."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def _same(extracted: str, answer: str) -> bool:
    one, other = _plain(extracted), _plain(answer)
    if one == other:
        return True
    first, second = _number(one), _number(other)
    return first is not None and first == second


def _plain(text: str) -> str:
    return " ".join(text.strip().strip("$").split()).rstrip(".").strip()


def _number(text: str) -> Decimal | None:
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None
