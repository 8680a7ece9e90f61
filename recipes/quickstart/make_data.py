"""Make everything that the quickstart recipe reads: a student, seed problems, three teachers' traces, held-out data.

    python recipes/quickstart/make_data.py

Nothing is downloaded: a tiny Llama is pretrained here, on the CPU (about a minute on two cores), to a partial skill in
mental arithmetic, and the teachers are three functions below. It shows the loop at work; it is no benchmark.

Problems are reasoning-gym's ``chain_sum`` with one-digit terms, shortened to the bare expression ("7+8-3+9"); only
those whose running total never falls below zero are kept. The student is pretrained on sums of 2 to 4 terms, each
written out in one of the three teachers' ways at random, as a base model has met many ways of reasoning; seed and
held-out problems all have 4 terms and are in none of its pretraining text. The teachers differ in how they reason:
``stepwise`` (one equation a line), ``ledger`` (a running balance), ``regroup`` (additions first, then subtractions;
careless: 22 % of its traces end in a wrong answer, which the filter drops before training).

Same seed, same machine, same versions: same bytes.
"""

import argparse
import json
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

NUM_SEED_PROBLEMS = 200
NUM_HELDOUT_PROBLEMS = 300
NUM_PROBE_PROBLEMS = 150  # decide when pretraining stops; neither seed nor held-out problems
NUM_TERMS = 4
CARELESS_TEACHER, WRONG_SHARE = "regroup", 0.22

# Pretraining. Skill comes late and fast, at a step that differs between machines: it is stopped by skill, not by step.
TARGET_ACCURACY = 0.35
FIRST_PROBE_STEP, PROBE_EVERY_STEPS, MAX_STEPS = 400, 50, 900
BATCH_SIZE, LEARNING_RATE, WARMUP_STEPS = 32, 4e-3, 50
NUM_THREADS = 2  # fixed: another number of threads gives other bytes

PAD, UNKNOWN, TURN_START, TURN_END = "<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
MANIFEST = "manifest.json"

Terms = tuple[int, ...]  # signed: 7+8-3 is (7, 8, -3)


class Chain(NamedTuple):
    """A chain of thought and the answer that it ends in."""

    reasoning: str
    answer: int


# --- Problems ---


def expression(terms: Sequence[int]) -> str:
    """The sum as a prompt: (7, 8, -3) is "7+8-3"."""
    return "".join(f"{term:+d}" for term in terms).removeprefix("+")


def draw_problems(seed: int, min_terms: int) -> Iterator[Terms]:
    """Sums of ``min_terms`` to ``NUM_TERMS`` one-digit terms, none with a running total below zero; they may repeat."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(
        "chain_sum", min_terms=min_terms, max_terms=NUM_TERMS, min_digits=1, max_digits=1, size=1_000_000, seed=seed
    )
    for entry in dataset:
        first, *rest = entry["metadata"]["expression"].split()
        terms = (int(first), *(int(sign + number) for sign, number in zip(rest[::2], rest[1::2], strict=True)))
        if all(sum(terms[:count]) >= 0 for count in range(1, len(terms) + 1)):
            yield terms


def draw_unseen(count: int, seed: int, seen: set[Terms]) -> list[Terms]:
    """``count`` different problems that are not in ``seen``, to which they are added."""
    chosen: list[Terms] = []
    for terms in draw_problems(seed, NUM_TERMS):
        if terms not in seen:
            seen.add(terms)
            chosen.append(terms)
        if len(chosen) == count:
            break
    return chosen


# --- Teachers ---
# Each writes len(terms) - 1 results. ``slips`` maps the index of a result to what it is wrong by.


def stepwise(terms: Terms, slips: dict[int, int]) -> Chain:
    """One equation a line: 7+8=15, 15-3=12."""
    total, lines = terms[0], []
    for index, term in enumerate(terms[1:]):
        result = total + term + slips.get(index, 0)
        lines.append(f"{total}{term:+d}={result}")
        total = result
    return Chain("\n".join(lines), total)


def ledger(terms: Terms, slips: dict[int, int]) -> Chain:
    """A running balance: start 7, +8 15, -3 12."""
    total = terms[0]
    lines = [f"start {total}"]
    for index, term in enumerate(terms[1:]):
        total += term + slips.get(index, 0)
        lines.append(f"{term:+d} {total}")
    return Chain("\n".join(lines), total)


def regroup(terms: Terms, slips: dict[int, int]) -> Chain:
    """Additions first, then subtractions: plus 7+8=15, minus 3, 15-3=12."""
    index = 0

    def add_up(numbers: Sequence[int]) -> Chain:
        nonlocal index
        total, text = numbers[0], str(numbers[0])
        for number in numbers[1:]:
            total += number + slips.get(index, 0)
            index += 1
            text += f"+{number}={total}"
        return Chain(text, total)

    plus = add_up([term for term in terms if term >= 0])
    if all(term >= 0 for term in terms):
        return Chain(f"plus {plus.reasoning}", plus.answer)
    minus = add_up([-term for term in terms if term < 0])
    answer = plus.answer - minus.answer + slips.get(index, 0)
    lines = [f"plus {plus.reasoning}", f"minus {minus.reasoning}", f"{plus.answer}-{minus.answer}={answer}"]
    return Chain("\n".join(lines), answer)


# How a teacher reasons, and how it words its response.
TEACHERS: dict[str, tuple[Callable[[Terms, dict[int, int]], Chain], str]] = {
    "stepwise": (stepwise, r"So \boxed{%d}"),
    "ledger": (ledger, r"Sum \boxed{%d}"),
    "regroup": (regroup, r"Total \boxed{%d}"),
}


def reason(teacher: str, terms: Terms, slips: dict[int, int] | None = None) -> tuple[str, str]:
    """A teacher's (reasoning, response)."""
    write, wording = TEACHERS[teacher]
    chain = write(terms, slips or {})
    return chain.reasoning, wording % chain.answer


def choose_slips(count: int, rng: random.Random) -> dict[int, dict[int, int]]:
    """For ``WRONG_SHARE`` of ``count`` problems, by index, one result that is off by one, by two or by a lost carry."""
    wrong = rng.sample(range(count), round(WRONG_SHARE * count))
    return {problem: {rng.randrange(NUM_TERMS - 1): rng.choice((-10, -2, -1, 1, 2, 10))} for problem in sorted(wrong)}


# --- Student ---


def build_tokenizer() -> Any:
    """One token a character, but one for each of the words that every trace repeats."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    special = [PAD, UNKNOWN, TURN_START, TURN_END]
    words = ["<think>", "</think>", "user", "assistant", r"\boxed"]
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: index for index, token in enumerate([*special, *words, *characters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(words)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=TURN_END,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: Any, seed: int) -> Any:
    """A Llama of 0.67 M parameters, freshly initialised."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        **ends,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(do_sample=False, **ends)
    return model


def render_prompt(tokenizer: Any, terms: Terms) -> str:
    """The text up to where the student begins to write."""
    message = [{"role": "user", "content": expression(terms)}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def pretraining_batches(tokenizer: Any, seed: int, held_back: set[Terms]) -> Iterator[tuple[Any, Any]]:
    """Endless (input ids, labels), both (B, T), padded on the right; labels are -100 on prompts and padding."""
    import torch

    rng = random.Random(seed)
    problems = (terms for terms in draw_problems(seed, min_terms=2) if terms not in held_back)
    while batch := list(islice(problems, BATCH_SIZE)):
        rows, starts = [], []
        for terms in batch:
            reasoning, response = reason(rng.choice(list(TEACHERS)), terms)
            prompt = tokenizer(render_prompt(tokenizer, terms))["input_ids"]
            trace = tokenizer(f"<think>\n{reasoning}\n</think>\n\n{response}{TURN_END}")["input_ids"]
            rows.append(prompt + trace)
            starts.append(len(prompt))
        ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
        labels = torch.full_like(ids, -100)
        for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
            ids[index, : len(row)] = torch.tensor(row)
            labels[index, start : len(row)] = torch.tensor(row[start:])
        yield ids, labels


def accuracy(model: Any, tokenizer: Any, problems: Sequence[Terms]) -> float:
    """Share of problems answered right, greedily, with the reasoning closed and the turn ended."""
    import torch

    inputs = tokenizer([render_prompt(tokenizer, terms) for terms in problems], padding=True, return_tensors="pt")
    model.eval()
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=64)
    model.train()
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    ends = [text.partition("</think>")[2].partition(TURN_END)[0] for text in texts]
    right = [end.endswith(rf"\boxed{{{sum(terms)}}}") for end, terms in zip(ends, problems, strict=True)]
    return float(sum(right) / len(right))


def pretrain(model: Any, tokenizer: Any, seed: int, probe: Sequence[Terms], held_back: set[Terms]) -> int:
    """Train until ``TARGET_ACCURACY`` on the probe problems, or ``MAX_STEPS``; returns the number of steps."""
    import torch
    from tqdm import tqdm

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    # The rate is never lowered: the student is meant to be left unpolished.
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / WARMUP_STEPS, total_iters=WARMUP_STEPS - 1)
    batches = islice(pretraining_batches(tokenizer, seed, held_back), MAX_STEPS)
    step = 0
    with tqdm(total=MAX_STEPS, desc="pretraining the student", unit="step", file=sys.stderr, disable=None) as bar:
        for step, (ids, labels) in enumerate(batches, start=1):
            # Padding is on the right and attention is causal: no mask is needed.
            logits = model(input_ids=ids).logits[:, :-1]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            bar.update()
            if step >= FIRST_PROBE_STEP and step % PROBE_EVERY_STEPS == 0:
                probed = accuracy(model, tokenizer, probe)
                bar.set_postfix_str(f"{probed:.0%} right, stops at {TARGET_ACCURACY:.0%}")
                if probed >= TARGET_ACCURACY:
                    bar.total = step
                    bar.refresh()
                    break
    return step


# --- Files ---


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_problems(path: Path, prefix: str, problems: Sequence[Terms]) -> list[str]:
    """Write the problems; returns their ids."""
    ids = [f"{prefix}-{number:03d}" for number in range(1, len(problems) + 1)]
    rows = [
        {"id": problem_id, "prompt": expression(terms), "answer": str(sum(terms))}
        for problem_id, terms in zip(ids, problems, strict=True)
    ]
    write_jsonl(path, rows)
    return ids


def write_traces(
    path: Path, teacher: str, ids: Sequence[str], problems: Sequence[Terms], slips: dict[int, dict[int, int]]
) -> None:
    """Write a teacher's trace for each problem; ``slips`` by the problem's index."""
    rows = []
    for index, (problem_id, terms) in enumerate(zip(ids, problems, strict=True)):
        reasoning, response = reason(teacher, terms, slips.get(index))
        row = {"problem_id": problem_id, "sample": 0, "reasoning": reasoning, "response": response}
        rows.append(row | {"finish_reason": "stop"})
    write_jsonl(path, rows)


def make(out: Path, seed: int) -> dict[str, Any]:
    """Write all of the data into the folder ``out``; returns what there is to say about the student."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(NUM_THREADS)

    # Item i of a reasoning-gym dataset depends on seed + i only: the datasets' seeds are kept far apart.
    first_seed = 10_000_000 * seed
    held_back: set[Terms] = set()
    seeds = draw_unseen(NUM_SEED_PROBLEMS, first_seed + 2_000_000, held_back)
    heldout = draw_unseen(NUM_HELDOUT_PROBLEMS, first_seed + 4_000_000, held_back)
    probe = draw_unseen(NUM_PROBE_PROBLEMS, first_seed + 6_000_000, held_back)

    seed_ids = write_problems(out / "problems.jsonl", "seed", seeds)
    heldout_ids = write_problems(out / "heldout.jsonl", "heldout", heldout)
    slips = choose_slips(len(seeds), random.Random(seed))
    for teacher in TEACHERS:
        wrong = slips if teacher == CARELESS_TEACHER else {}
        write_traces(out / "traces" / f"{teacher}.jsonl", teacher, seed_ids, seeds, wrong)
        write_traces(out / "traces" / f"heldout-{teacher}.jsonl", teacher, heldout_ids, heldout, {})

    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed)
    print("pretraining the student, about a minute and a half on two cores", file=sys.stderr)
    started = time.perf_counter()
    steps = pretrain(model, tokenizer, first_seed, probe, held_back)
    seconds = time.perf_counter() - started
    model.save_pretrained(out / "student")
    tokenizer.save_pretrained(out / "student")
    return {
        "parameters": model.num_parameters(),
        "steps": steps,
        "seconds": seconds,
        "accuracy": accuracy(model, tokenizer, heldout),
    }


def contents(folder: Path) -> dict[str, int]:
    """Size in bytes of each file below ``folder``, the manifest aside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def is_complete(out: Path, seed: int) -> bool:
    """Whether ``out`` holds what this script wrote with this seed."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(manifest == {"seed": seed, "bytes": contents(out)})


def main() -> int:
    """Returns the exit status: 0 done, 2 something that the user can mend."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    default = Path(__file__).parent / "data"
    parser.add_argument("--out", type=Path, default=default, help="folder to write (default: data, beside this script)")
    parser.add_argument("--seed", type=int, default=1, help="of the problems, the slips and the student (default: 1)")
    arguments = parser.parse_args()
    out: Path = arguments.out
    if is_complete(out, arguments.seed):
        print(f"{out}: complete already; nothing to do")
        return 0
    if out.exists():
        print(
            f"{out}: not what this script writes with --seed {arguments.seed}; remove it, or give another --out",
            file=sys.stderr,
        )
        return 2

    # Before torch is imported: threads that spin while they wait slow a step down several times on busy cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    student = make(partial, arguments.seed)
    manifest = {"seed": arguments.seed, "bytes": contents(partial)}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, out)
    print(
        f"{out}: a student of {student['parameters']:,} parameters, pretrained for {student['steps']} steps in "
        f"{student['seconds']:.0f} s, answers {student['accuracy']:.0%} of {NUM_HELDOUT_PROBLEMS} held-out problems; "
        f"{NUM_SEED_PROBLEMS} seed problems with traces of {len(TEACHERS)} teachers"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
