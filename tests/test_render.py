import pytest
from conftest import pico_tokenizer

from motkit.errors import UserError
from motkit.render import Renderer, UnfitTrace
from motkit.traces import SeedProblem, Trace

PROBLEM = SeedProblem(id="p", prompt="1 + 1?", answer="2")

# How Qwen3 treats an assistant message: reasoning is taken out, and an empty think block put in front.
QWEN3_LIKE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n'"
    " + m.content.split('</think>')[-1] + '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content"
    " + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# How DeepSeek-R1-Distill asks: the think tag is already open.
R1_LIKE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ 'A:' + m.content.split('</think>')[-1] + '<|im_end|>' }}"
    "{% else %}{{ 'U:' + m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'A:<think>\n' }}{% endif %}"
)
# How Gemma ends a turn: with a token that is not the tokenizer's EOS, and a newline.
GEMMA_LIKE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|end_of_turn|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>model\n' }}{% endif %}"
)


def trace(reasoning="one and one", response=r"It is \boxed{2}.") -> Trace:
    return Trace(problem_id="p", sample=0, reasoning=reasoning, response=response, finish_reason="stop")


def renderer(template=None, extra=()) -> Renderer:
    tokenizer = pico_tokenizer()
    if template is not None:
        tokenizer.chat_template = template or None
    if extra:
        tokenizer.add_special_tokens({"additional_special_tokens": list(extra)})
    ends = {tokenizer.eos_token_id} | {tokenizer.convert_tokens_to_ids(token) for token in extra}
    return Renderer(tokenizer, ends)


def completion(rendered, using: Renderer) -> str:
    labels = [label for label in rendered.labels if label != -100]
    return str(using.tokenizer.decode(labels))


@pytest.mark.parametrize(
    ("template", "extra", "prompt_ends", "expected"),
    [
        (None, (), "<|im_start|>assistant\n", "<think>\none and one\n</think>\n\nIt is \\boxed{2}.<|im_end|>"),
        (QWEN3_LIKE, (), "<|im_start|>assistant\n", "<think>\none and one\n</think>\n\nIt is \\boxed{2}.<|im_end|>"),
        (R1_LIKE, (), "A:<think>\n", "one and one\n</think>\n\nIt is \\boxed{2}.<|im_end|>"),
        (
            GEMMA_LIKE,
            ("<|end_of_turn|>",),
            "<|im_start|>model\n",
            "<think>\none and one\n</think>\n\nIt is \\boxed{2}.<|end_of_turn|>",
        ),
        ("", (), "1 + 1?\n\n", "<think>\none and one\n</think>\n\nIt is \\boxed{2}.<|im_end|>"),
    ],
    ids=["chatml", "qwen3", "r1", "gemma", "no template"],
)
def test_the_labels_hold_the_whole_trace_and_the_end(template, extra, prompt_ends, expected):
    using = renderer(template, extra)
    rendered = using.render(PROBLEM, trace())
    assert using.tokenizer.decode(rendered.input_ids[: rendered.num_prompt_tokens]).endswith(prompt_ends)
    assert completion(rendered, using) == expected
    assert rendered.labels[-1] in using.end_ids
    assert rendered.input_ids[: rendered.num_prompt_tokens] == using.prompt_ids(PROBLEM)
    assert len(rendered.labels) == len(rendered.input_ids)


def test_without_reasoning_there_is_no_think_block_unless_the_prompt_opens_one():
    plain = renderer()
    assert completion(plain.render(PROBLEM, trace(reasoning="")), plain) == r"It is \boxed{2}.<|im_end|>"
    opened = renderer(R1_LIKE)
    assert completion(opened.render(PROBLEM, trace(reasoning="")), opened).startswith("\n</think>\n\nIt is")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (trace(response="stop <|im_end|> go"), "response holds '<|im_end|>'"),
        (trace(reasoning="a </think> b"), "reasoning holds '</think>'"),
        (trace(response="<think>"), "response holds '<think>'"),
        (trace(response="naïve"), "does not keep its text"),
    ],
)
def test_a_trace_that_would_be_mangled_is_unfit(given, says):
    with pytest.raises(UnfitTrace) as caught:
        renderer().render(PROBLEM, given)
    assert says in str(caught.value)


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(UserError, match="no EOS token"):
        Renderer(pico_tokenizer(), set())


def test_generated_text_is_split_where_training_put_the_tags():
    using = renderer()
    prompt = using.prompt(PROBLEM)
    text = using.completion(prompt, trace()).removesuffix("<|im_end|>")
    assert using.parse(prompt, text) == ("one and one", r"It is \boxed{2}.")
    assert using.parse(prompt, r"just \boxed{2}") == ("", r"just \boxed{2}")
    assert using.parse(prompt, r"<think> try \boxed{2} wait") is None
    opened = renderer(R1_LIKE)
    assert opened.parse("A:<think>\n", r"try \boxed{2} wait") is None
    assert opened.parse("A:<think>\n", "so\n</think>\n\n2") == ("so", "2")
