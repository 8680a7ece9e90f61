"""Problems and traces as the student's tokens: the same prompt for training and for generation.

A trace is not passed through the chat template as an assistant message: templates delete reasoning, add an empty think
block, or move the boundary of the loss. The prompt is rendered by the template with its generation prompt, and what
follows is exactly what the student should generate: reasoning between think tags, response, end of turn.
"""

from dataclasses import dataclass
from typing import Any

from motkit.errors import UserError
from motkit.traces import SeedProblem, Trace

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"


class UnfitTrace(Exception):
    """A trace that this student cannot be taught as it stands; the message says why. It is rejected and counted."""


@dataclass(frozen=True)
class RenderedTrace:
    """A trace in tokens.

    ``input_ids``: T token ids, prompt then completion. The first ``num_prompt_tokens`` carry no loss.
    """

    problem_id: str
    sample: int
    input_ids: list[int]
    num_prompt_tokens: int

    @property
    def labels(self) -> list[int]:
        """T target ids; -100 where there is no loss."""
        return [-100] * self.num_prompt_tokens + self.input_ids[self.num_prompt_tokens :]

    @property
    def num_completion_tokens(self) -> int:
        """Tokens that carry loss."""
        return len(self.input_ids) - self.num_prompt_tokens


class Renderer:
    """Renders for one student.

    Args:
        tokenizer: the student's, as transformers loads it. Without a chat template a prompt is followed by an empty
            line, which is how base models are commonly asked.
        end_ids: token ids that end a generation.
    """

    def __init__(self, tokenizer: Any, end_ids: set[int]) -> None:
        if not end_ids:
            raise UserError("the student's tokenizer has no EOS token: set eos_token in its tokenizer_config.json")
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self._end_of_turn = self._find_end_of_turn()
        # A special token inside a trace would be read as the end of the turn, or as another turn's beginning.
        self._special = sorted(set(tokenizer.all_special_tokens) | {self._end_of_turn} - {""})

    def prompt(self, problem: SeedProblem) -> str:
        """The text up to where the student begins to generate."""
        if self.tokenizer.chat_template is None:
            return f"{self.tokenizer.bos_token or ''}{problem.prompt}\n\n"
        message = [{"role": "user", "content": problem.prompt}]
        return str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))

    def prompt_ids(self, problem: SeedProblem) -> list[int]:
        """T token ids of `prompt`."""
        return self._encode(self.prompt(problem))

    def completion(self, prompt: str, trace: Trace) -> str:
        """What the student should generate after ``prompt``, end of turn included.

        Raises:
            UnfitTrace: the trace's own text holds think tags or special tokens of the student.
        """
        for name, text in (("reasoning", trace.reasoning), ("response", trace.response)):
            for token in (THINK_OPEN, THINK_CLOSE, *self._special):
                if token in text:
                    raise UnfitTrace(f"{name} holds {token!r}")
        already_open = prompt.rstrip().endswith(THINK_OPEN)
        body = trace.response
        if trace.reasoning or already_open:
            opening = "" if already_open else f"{THINK_OPEN}\n"
            body = f"{opening}{trace.reasoning}\n{THINK_CLOSE}\n\n{trace.response}"
        return body + self._end_of_turn

    def render(self, problem: SeedProblem, trace: Trace) -> RenderedTrace:
        """The trace in tokens; its labels, decoded, hold the whole completion and end with an end token.

        Raises:
            UnfitTrace: see `completion`, or the tokenizer loses characters of the trace.
        """
        prompt = self.prompt(problem)
        completion = self.completion(prompt, trace)
        prompt_ids, whole_ids = self._encode(prompt), self._encode(prompt + completion)
        if whole_ids[: len(prompt_ids)] != prompt_ids:
            # A token spans the boundary. When generating, the prompt is tokenised alone: so it is here.
            whole_ids = prompt_ids + self._encode(completion)
        rendered = RenderedTrace(trace.problem_id, trace.sample, whole_ids, len(prompt_ids))
        decoded = self.tokenizer.decode(
            whole_ids[len(prompt_ids) :], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        if decoded.lstrip(" ") != completion.lstrip(" "):
            raise UnfitTrace(
                f"the student's tokenizer does not keep its text: {_first_difference(decoded, completion)}"
            )
        if whole_ids[-1] not in self.end_ids:
            raise UserError(
                f"trace {trace.label}: the rendered trace does not end with an end token (ids {sorted(self.end_ids)}); "
                "set eos_token in the student's tokenizer_config.json"
            )
        return rendered

    def parse(self, prompt: str, text: str) -> tuple[str, str] | None:
        """Split generated text into (reasoning, response); None when the reasoning never ends."""
        head, closed, tail = text.partition(THINK_CLOSE)
        if closed:
            return head.strip().removeprefix(THINK_OPEN).strip("\n"), tail.strip()
        if THINK_OPEN in text or prompt.rstrip().endswith(THINK_OPEN):
            return None
        return "", text.strip()

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _find_end_of_turn(self) -> str:
        """The token that closes an assistant turn in the template, if generation stops at it; else EOS."""
        fallback = str(self.tokenizer.eos_token or self.tokenizer.convert_ids_to_tokens(min(self.end_ids)))
        if self.tokenizer.chat_template is None:
            return fallback
        mark = "motkit-end-of-turn"
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
        after = str(self.tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(mark)[2]
        ends = [self.tokenizer.convert_ids_to_tokens(end) for end in self.end_ids]
        found = [(after.find(end), end) for end in ends if end and end in after]
        return str(min(found)[1]) if found else fallback


def _first_difference(got: str, expected: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected)))
    return f"{expected[at : at + 20]!r} becomes {got[at : at + 20]!r} at character {at}"
