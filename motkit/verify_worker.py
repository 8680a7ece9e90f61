"""The process in which answers are compared: started, limited and, if need be, killed by `motkit.verify`.

``python verify_worker.py KIND TIME_LIMIT_S MEMORY_LIMIT_MB`` imports what KIND needs, says so on stdout, and forks a
child; the child answers each request on stdin (a JSON object a line: gold, answer, …) by one line on stdout. It dies of
a time limit that a kernel timer keeps, or of a memory limit, and is forked anew, which costs milliseconds. The script
imports nothing of motkit. An answer is a stranger's text: it is parsed, never executed. What would evaluate it
(reasoning-gym's scorers call ``eval`` and sympy's ``parse_expr``, which is ``eval`` too) gets a reader of literals and
plain arithmetic instead, and an audit hook forbids the process to write files, start programs or open connections.
"""

import ast
import difflib
import gc
import json
import math
import mmap
import operator
import os
import re
import resource
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from typing import Any

Judged = tuple[bool | None, str]
_EQUAL: Judged = (True, "equal")
_DIFFERENT: Judged = (False, "not equal")

WALL_PER_LIMIT = 6  # wall seconds that an answer may take, for each processor second of its limit
_ANSWERS_PER_CHILD = 20_000  # then it is forked anew: what libraries cache and leak stays bounded

# Texts: what a person writes for what a LaTeX parser knows.
_CHARACTERS = {
    **dict.fromkeys("−–—﹣－", "-"),
    **dict.fromkeys("\u00a0\u2009\u202f\u2007\u3000", " "),
    "×": r"\times ", "·": r"\cdot ", "÷": "/", "∞": r"\infty ", "π": r"\pi ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ",
    "∩": r"\cap ", "∅": r"\emptyset ", "°": r"^{\circ}", "％": "%", "٪": "%", "٫": ".", "٬": ",", "，": ",", "（": "(",
    "）": ")", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "⅔": r"\frac{2}{3}",
    "²": "^{2}", "³": "^{3}", "±": r"\pm ",
}  # fmt: skip
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_][\w'’.&-]*(?:\s+[^\W\d_][\w'’.&-]*)*", re.UNICODE)
_MATHEMATICAL_WORDS = {"infinity", "sqrt", "frac", "percent", "sinh", "cosh", "tanh", "arctan", "arcsin", "arccos"}

# Unit → (dimension, size in the dimension's base unit). Metres with square and cube are dimensions of their own.
_LENGTHS = {"mm": 1e-3, "cm": 1e-2, "dm": 1e-1, "m": 1.0, "km": 1e3, "in": 0.0254, "inches": 0.0254, "inch": 0.0254,
            "ft": 0.3048, "feet": 0.3048, "foot": 0.3048, "yd": 0.9144, "yards": 0.9144, "yard": 0.9144,
            "mi": 1609.344, "miles": 1609.344, "mile": 1609.344, "meters": 1.0, "meter": 1.0, "metres": 1.0,
            "metre": 1.0, "kilometers": 1e3, "kilometres": 1e3, "centimeters": 1e-2, "centimetres": 1e-2}  # fmt: skip
_UNITS: dict[str, tuple[str, float]] = {
    **{name: ("length", size) for name, size in _LENGTHS.items()},
    **{f"{name}^2": ("area", size**2) for name, size in _LENGTHS.items()},
    **{f"{name}^3": ("volume", size**3) for name, size in _LENGTHS.items()},
    **dict.fromkeys(("l", "L", "liter", "liters", "litre", "litres"), ("volume", 1e-3)),
    **dict.fromkeys(("ml", "mL", "cc"), ("volume", 1e-6)),
    **dict.fromkeys(("g", "gram", "grams"), ("mass", 1e-3)),
    **dict.fromkeys(("kg", "kilogram", "kilograms"), ("mass", 1.0)),
    "mg": ("mass", 1e-6), "t": ("mass", 1e3), "lb": ("mass", 0.45359237), "oz": ("mass", 0.028349523125),
    **dict.fromkeys(("s", "sec", "second", "seconds"), ("time", 1.0)),
    **dict.fromkeys(("min", "minute", "minutes"), ("time", 60.0)),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), ("time", 3600.0)),
    **dict.fromkeys(("day", "days"), ("time", 86400.0)),
    **dict.fromkeys(("week", "weeks"), ("time", 604800.0)),
    "ms": ("time", 1e-3),
    "m/s": ("speed", 1.0), "km/h": ("speed", 1 / 3.6), "mph": ("speed", 0.44704),
    "^{\\circ}": ("angle", 1.0), "degrees": ("angle", 1.0), "degree": ("angle", 1.0),
    "N": ("force", 1.0), "J": ("energy", 1.0), "kJ": ("energy", 1e3), "W": ("power", 1.0), "kW": ("power", 1e3),
    "$": ("dollar", 1.0), "dollars": ("dollar", 1.0), "dollar": ("dollar", 1.0), "cents": ("dollar", 0.01),
    "cent": ("dollar", 0.01), "€": ("euro", 1.0), "euros": ("euro", 1.0), "£": ("pound", 1.0), "¥": ("yen", 1.0),
}  # fmt: skip
_TRAILING_UNIT = re.compile(r"^(?P<value>.*[\d})\].])\s*(?P<unit>\^\{\\circ\}|[A-Za-z€£¥]+(?:/[A-Za-z]+)?(?:\^[23])?)$")
_LEADING_CURRENCY = re.compile(r"^(?P<unit>[$€£¥])\s*(?P<value>[-\d.].*)$")
_MAGNITUDES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_MAGNITUDE = re.compile(rf"(?<=\d)\s*(?:\\text\s*\{{)?\s*\b({'|'.join(_MAGNITUDES)})\b\s*\}}?", re.IGNORECASE)
_MIXED = re.compile(r"^(-?\d+) (\d+)/(\d+)(?=$| )")
_FLOAT = re.compile(r"^(-?\d+(?:\.\d*)?)[eE]([-+]?\d{1,9})$")
_NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
_COUNTED = re.compile(r"^(-?\d+(?:\.\d+)?)(?: [A-Za-z]{3,})+$")
_DIGIT_GROUPS = re.compile(r"^-?\d{1,3}(?:[ ,]\d{3})+(?:\.\d+)?$")


def clean(text: str) -> str:
    """One spelling for characters, spaces and thousands separators; nothing that changes a value."""
    text = "".join(
        _CHARACTERS.get(char, char)
        if ord(char) > 127 and not char.isdecimal()
        else str(unicodedata.decimal(char))
        if ord(char) > 127
        else char
        for char in text
    )
    text = text.replace(r"\$", "$").replace(r"\degree", r"^{\circ}").replace(r"^\circ", r"^{\circ}")
    text = re.sub(r"(?<!\\)%", r"\%", text).replace(r"\varnothing", r"\emptyset")
    text = re.sub(r"√\s*(\d+|[A-Za-z])", r"\\sqrt{\1}", text)
    text = re.sub(r"\\(?:dfrac|tfrac|cfrac)", r"\\frac", text)
    text = re.sub(r"\\(?:displaystyle|left|right|bigl|bigr|big|Big)(?![A-Za-z])", "", text)
    text = re.sub(r"\\(?:underline|boldsymbol|bm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"(?<=\d)\s*(?:\{,\}|,\\!|\\,|\\!|\\;|\\ |~)\s*(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"\\[,;:!]|\\quad|\\qquad|~", " ", text)
    text = " ".join(text.split())
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text.replace("$", "")
    text = re.sub(r"^\\approx\s*", "", text.strip().strip("*").rstrip(".").strip())
    text = _MAGNITUDE.sub(lambda match: rf"\times 10^{{{_MAGNITUDES[match[1].lower()]}}}", text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _FLOAT.sub(r"\1 \\times 10^{\2}", text)
    return _without_groups(text)


def _without_groups(text: str) -> str:
    """``1,000,000`` without its thousands separators; any other text as it is."""
    return text.replace(" ", "").replace(",", "") if _DIGIT_GROUPS.match(text) else text


def plain_words(text: str) -> str | None:
    """The text in lower case if it is words and nothing else (a weekday, a name, ``no solution``); else None."""
    bare = _TEXT_COMMAND.sub(r"\1", text).strip()
    bare = " ".join(bare.rstrip(".").split())
    if not _WORDS.fullmatch(bare) or bare.lower() in _MATHEMATICAL_WORDS:
        return None
    words = re.split(r"[\s'’.&-]+", bare)
    # Up to three letters may be a product of variables, where the order does not matter.
    name = len(bare) == 3 and (bare.istitle() or bare.casefold() == "yes")
    if (
        name
        or any(len(word) >= 4 for word in words)
        or sum(len(word) >= 2 for word in words) >= 2
        or not bare.isascii()
    ):
        return bare.casefold()
    return None


def split_unit(text: str) -> tuple[str, tuple[str, float] | None]:
    """(value, known unit): ``5\\text{ cm}`` is ``5`` and centimetres. Unknown units stay in the text."""
    bare = _TEXT_COMMAND.sub(r" \1", text)
    bare = re.sub(r"\^\{([23])\}", r"^\1", bare).strip()
    bare = re.sub(r"\bsquare (\w+)$", r"\1^2", bare)
    bare = re.sub(r"\bcubic (\w+)$", r"\1^3", bare)
    for pattern in (_LEADING_CURRENCY, _TRAILING_UNIT):
        match = pattern.match(bare)
        if match and match["unit"] in _UNITS:
            # A single letter right after a number, as in 5m, is as likely a variable: it takes a space or \text.
            if len(match["unit"]) == 1 and match["unit"].isalpha() and match.end("value") == match.start("unit"):
                continue
            return match["value"].strip(), _UNITS[match["unit"]]
    return text, None


def compare_math(request: dict[str, Any]) -> Judged:
    """Whether two answers are the same mathematical object, as math-verify sees it, with guards where it errs."""
    gold, answer = clean(request["gold"]), clean(request["answer"])
    if not answer:
        return False, "the answer is empty"
    if gold == answer:
        return _EQUAL
    gold_words, answer_words = plain_words(gold), plain_words(answer)
    if gold_words is not None:
        # math-verify reads words as products of letters: listen would equal silent.
        return _EQUAL if gold_words == answer_words else _DIFFERENT
    if answer_words is not None and gold.isdigit():
        return _EQUAL if answer_words in _NUMBER_WORDS[int(gold[:3]) :][:1] and len(gold) <= 2 else _DIFFERENT
    gold_value, gold_unit = split_unit(gold)
    answer_value, answer_unit = split_unit(answer)
    factor = 1.0
    if gold_unit and answer_unit:
        if gold_unit[0] != answer_unit[0]:
            return False, f"units differ: {answer_unit[0]} for {gold_unit[0]}"
        factor = answer_unit[1] / gold_unit[1]
    if gold_unit or answer_unit:
        gold, answer = _without_groups(gold_value), _without_groups(answer_value)
    counted = _COUNTED.match(answer)
    if counted and re.fullmatch(r"-?[\d.]+", gold):
        answer = counted[1]  # 15 years old
    if re.fullmatch(r"-?\d+\.\d+", gold) and re.fullmatch(r"-?\d+,\d{1,2}", answer):
        answer = answer.replace(",", ".")  # where the known answer is a decimal, so is 2,5
    brackets = {gold[:1] if gold[:1] in "([" else gold[:2], answer[:1] if answer[:1] in "([" else answer[:2]}
    if r"\{" in brackets and brackets & {"(", "["} and not re.search(r"\||\\mid|:", gold + answer):
        return False, "a set and a tuple or an interval"
    return _same_object(gold, answer, factor)


def _same_object(gold: str, answer: str, factor: float) -> Judged:
    import math_verify

    known, given = _parse(gold), _parse(answer)
    if not known or isinstance(known[0], str):
        text = gold.casefold().replace(" ", "") == answer.casefold().replace(" ", "")
        return _EQUAL if text else (None, "the known answer cannot be read as mathematics")
    if not given or isinstance(given[0], str):
        return False, "the answer cannot be read as mathematics"
    if factor != 1.0:
        one, other = _real(known[0]), _real(given[0])
        if one is None or other is None:
            return None, "a quantity in another unit that is not a number"
        return _EQUAL if _close(one, other * factor) else _DIFFERENT
    same = math_verify.verify(known, given, timeout_seconds=None, allow_set_relation_comp=True)
    one, other = _real(known[0]), _real(given[0])
    if one is not None and other is not None and ("%" in gold) != ("%" in answer):
        # 50% stands for 0.5 and for 50.
        plain, percent = (other, one) if "%" in gold else (one, other)
        return _EQUAL if _close(plain, percent) or _close(plain, 100 * percent) else _DIFFERENT
    infinite = _is_infinite(known[0]), _is_infinite(given[0])
    if not same or set(infinite) == {True, False}:
        # math-verify's comparison of a number with a power of infinities has come out either way.
        return _DIFFERENT
    if one is not None and other is not None and not _close(one, other):
        return False, "equal only when rounded"  # math-verify rounds to six decimals: 2e-7 would equal 3e-7
    return _EQUAL


def _parse(text: str) -> list[Any]:
    import math_verify

    # LaTeX only: the reader of plain expressions calls eval.
    config = math_verify.LatexExtractionConfig(boxed_match_priority=0)
    return list(math_verify.parse(rf"\boxed{{{text}}}", extraction_config=[config], parsing_timeout=None))


def _real(value: Any) -> float | None:
    """The value of a number or of ``x = number``; None for anything else."""
    import sympy

    try:
        value = value.rhs if isinstance(value, sympy.Eq) else value
        if not isinstance(value, sympy.Expr) or value.free_symbols:
            return None
        number = complex(value.doit().evalf(30))
    except (TypeError, ValueError, AttributeError, OverflowError):
        return None
    return number.real if number.imag == 0 else None


def _is_infinite(value: Any) -> bool | None:
    """Whether an infinity is in an expression; None for an interval, a relation, …, which may be written without."""
    import sympy

    if not isinstance(value, sympy.Expr):
        return None
    return bool(value.has(sympy.oo, -sympy.oo, sympy.zoo, sympy.nan))


def _close(one: float, other: float) -> bool:
    if math.isinf(one) or math.isinf(other):
        return one == other
    return abs(one - other) <= 2e-6 * max(abs(one), abs(other))


# reasoning-gym

_OPERATORS: dict[type, Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod, ast.USub: operator.neg, ast.UAdd: operator.pos,
    ast.BitAnd: operator.and_, ast.BitOr: operator.or_, ast.BitXor: operator.xor, ast.Invert: operator.invert,
    ast.LShift: operator.lshift, ast.RShift: operator.rshift, ast.Pow: operator.pow,
}  # fmt: skip
_ALGEBRA = re.compile(
    r"(?:\d+(?:\.\d*)?|\.\d+|(?:sin|cos|tan|sec|csc|cot|sinh|cosh|tanh|asin|acos|atan|exp|log|ln|sqrt|Abs|abs|pi)\b"
    r"|[A-Za-z]\b|[-+*/^(),\s])*"
)


def read_literal(text: Any, *_: Any) -> Any:
    """What ``eval`` is for reasoning-gym here: literals and arithmetic on numbers, nothing that has a name.

    Raises:
        ValueError: the text is anything else.
    """

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Expression):
            return value(node.body)
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and type(node.op) in _OPERATORS:
            return _OPERATORS[type(node.op)](value(node.operand))
        return ast.literal_eval(node)  # type: ignore[arg-type]

    return value(ast.parse(str(text).strip(), mode="eval"))


def _prepare_reasoning_gym() -> None:
    import reasoning_gym  # noqa: F401 (registers every task)
    import sympy
    from sympy.parsing import sympy_parser

    parse_expr = sympy_parser.parse_expr

    def read_algebra(text: str, *arguments: Any, **keywords: Any) -> Any:
        if len(text) > 2000 or not _ALGEBRA.fullmatch(text):
            raise ValueError("not plain algebra")
        return parse_expr(text, *arguments, **keywords)

    def refuse(*_: Any) -> Any:
        raise ValueError("nothing is executed here")

    for name, module in list(sys.modules.items()):
        if name.startswith("reasoning_gym"):
            # A module's own name hides the built-in one.
            vars(module).update(eval=read_literal, exec=refuse)
            if vars(module).get("parse_expr") is parse_expr:
                vars(module)["parse_expr"] = read_algebra
    sympy.parse_expr = sympy_parser.parse_expr = read_algebra


def score_reasoning_gym(request: dict[str, Any]) -> Judged:
    """Right if the task's own scorer gives 1."""
    score = float(_scorer(request["task"])(request["answer"], request["entry"]))
    return score >= 1.0 - 1e-9, f"score {score:g}"


class UnknownTask(Exception):
    """There is no such task: the user's fault, not the answer's."""


_scorers: dict[str, Callable[..., float]] = {}


def _scorer(task: str) -> Callable[..., float]:
    if task not in _scorers:
        from reasoning_gym.factory import DATASETS, get_score_answer_fn

        if task not in DATASETS:
            close = difflib.get_close_matches(task, list(DATASETS), n=1)
            raise UnknownTask(
                f"reasoning-gym has no task {task!r}" + (f"; did you mean '{close[0]}'?" if close else "")
            )
        _scorers[task] = get_score_answer_fn(task)
    return _scorers[task]


# The process


def prepare(kind: str) -> str | None:
    """Import what a kind needs and warm it up; what is wrong in words if it cannot be used."""
    if kind == "math":
        compare_math({"gold": r"\frac{1}{2}", "answer": "0.5"})
        compare_math({"gold": "(1, x^2+1]", "answer": r"\{2, \sqrt{3}\}"})
        if not compare_math({"gold": r"50\%", "answer": "0.5"})[0]:
            from importlib.metadata import version

            got = version("antlr4-python3-runtime")
            return (
                f"math-verify does not read percentages with antlr4-python3-runtime {got} (its grammar for that "
                "version is an older one); pip install antlr4-python3-runtime==4.13.2"
            )
        return None
    try:
        _prepare_reasoning_gym()
    except ImportError as error:
        return f"{error}; install it: pip install 'motkit[quickstart]'"
    return None


_FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.rename", "os.rmdir", "os.mkdir",
              "os.chmod", "os.truncate", "os.kill", "os.putenv", "subprocess.", "socket.", "shutil.", "ctypes.",
              "pty.")  # fmt: skip


def _forbid() -> None:
    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"{event} is forbidden here")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            raise PermissionError("writing is forbidden here")

    sys.addaudithook(hook)


def _limit_memory(megabytes: int) -> None:
    """Let this process grow by so much from where it is now."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + megabytes * 2**20,) * 2)


def _requests() -> Iterator[dict[str, Any]]:
    """Read without a buffer of Python's, which a successor would not inherit."""
    read = b""
    while True:
        got = os.read(0, 65536)
        if not got:
            return
        read += got
        if read.endswith(b"\n"):  # requests come one at a time
            yield json.loads(read)
            read = b""


def _compare(request: dict[str, Any], time_limit_s: float) -> Judged:
    compare = compare_math if request["kind"] == "math" else score_reasoning_gym
    # In seconds of the processor, so that a busy machine does not lose right answers; in wall seconds, should it sleep.
    # The default action of these signals ends the process, also inside a computation in C.
    signal.setitimer(signal.ITIMER_PROF, time_limit_s)
    signal.setitimer(signal.ITIMER_REAL, WALL_PER_LIMIT * time_limit_s)
    try:
        return compare(request)
    except MemoryError:
        return None, "out of memory"
    except RecursionError:
        return None, "nested too deeply"
    except UnknownTask:
        raise
    except Exception as error:  # whatever a stranger's text provokes in a parser
        return None, f"{type(error).__name__} while comparing"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _answer_requests(replies: int, busy: mmap.mmap, time_limit_s: float, memory_limit_mb: int) -> int:
    """The child: compare until stdin closes (0) or it is time for a successor (1)."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _limit_memory(memory_limit_mb)
    _forbid()
    for answered, request in enumerate(_requests()):
        busy[0] = 1
        try:
            correct, reason = _compare(request, time_limit_s)
            reply: dict[str, Any] = {"correct": correct, "reason": reason}
        except UnknownTask as error:
            reply = {"fault": str(error)}
        os.write(replies, json.dumps(reply).encode() + b"\n")
        busy[0] = 0
        if reply.get("reason") == "out of memory" or answered >= _ANSWERS_PER_CHILD:
            return 1
    return 0


def main(kind: str, time_limit_s: float, memory_limit_mb: int) -> None:
    """Prepare once, then keep one forked child answering; one that dies over an answer is replaced in an instant."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies = os.dup(1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # libraries print
    fault = prepare(kind)
    os.write(replies, json.dumps({"fault": fault}).encode() + b"\n")
    if fault:
        return
    os.dup2(null, 2)
    gc.freeze()
    busy = mmap.mmap(-1, 1)  # shared with the child
    while True:
        child = os.fork()
        if child == 0:
            status = 2
            try:
                status = _answer_requests(replies, busy, time_limit_s, memory_limit_mb)
            finally:
                os._exit(status)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            return
        if busy[0]:
            busy[0] = 0
            late = code in (-signal.SIGALRM, -signal.SIGPROF)
            reason = f"no verdict within {time_limit_s:g} s" if late else f"the worker process ended with {code}"
            os.write(replies, json.dumps({"correct": None, "reason": reason}).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]))
