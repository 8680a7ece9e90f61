"""Token confidence against a plain float64 computation; whole characters; escaped text; bounded memory."""

import subprocess
import sys

import numpy
import pandas
import pytest
from conftest import PICO_KINDS, make_pico_checkpoint, pico_tokenizer

from motkit.analysis import confidence
from motkit.analysis.models import load_model
from motkit.errors import UserError
from motkit.render import RenderedTrace


def some_traces(lengths=(5, 40, 23, 8), vocabulary=90, seed=3):
    draw = numpy.random.default_rng(seed)
    ids = [draw.integers(2, vocabulary, size=length).tolist() for length in lengths]
    return [RenderedTrace(f"p{number}", 0, some, 2 + number) for number, some in enumerate(ids)]


def plain_scores(model, trace):
    """The textbook: all logits at once, in float64."""
    import torch

    with torch.no_grad():
        logits = model.double()(input_ids=torch.tensor([trace.input_ids])).logits[0]
    log_p = torch.log_softmax(logits, -1)[trace.num_prompt_tokens - 1 : -1]
    target = torch.tensor(trace.input_ids[trace.num_prompt_tokens :])
    own = log_p.gather(1, target[:, None])
    entropy = -(log_p.exp() * log_p).sum(-1)
    return own[:, 0].numpy(), (log_p >= own).sum(-1).numpy(), entropy.numpy()


@pytest.mark.parametrize("kind", [*PICO_KINDS, "gemma3-softcap"])
def test_scores_are_those_of_a_plain_float64_computation(kind, tmp_path):
    changes = {"final_logit_softcapping": 0.7} if kind == "gemma3-softcap" else {}
    checkpoint = make_pico_checkpoint(kind.partition("-")[0], tmp_path / "m", **changes)
    traces = some_traces()
    model = load_model(checkpoint, dtype="float32", device="cpu")
    vocabulary = model.config.vocab_size
    found = confidence.score_traces(model, traces, chunk_bytes=4 * vocabulary * 7, batch_tokens=60)
    exact = load_model(checkpoint, dtype="float64", device="cpu", attention="eager")
    for trace, scores in zip(traces, found, strict=True):
        log_p, rank, entropy = plain_scores(exact, trace)
        assert len(scores.rank) == trace.num_completion_tokens
        numpy.testing.assert_allclose(scores.log_probability, log_p, atol=2e-5)
        numpy.testing.assert_allclose(scores.entropy, entropy, atol=2e-5)
        # float32 may swap neighbours that are nearly equal
        assert (abs(scores.rank - rank) <= 1).all()
        assert (scores.rank == rank).mean() > 0.9


def test_logits_of_minus_infinity_have_no_entropy_and_nan_is_refused(tmp_path):
    import torch

    logits = torch.tensor([[0.0, 0.0, -torch.inf], [1.0, 3.0, -torch.inf]])
    log_p, rank, entropy = confidence._score(logits, torch.tensor([0, 0]))
    assert log_p.tolist() == pytest.approx([numpy.log(0.5), 1 - numpy.log(numpy.exp(1) + numpy.exp(3))])
    assert rank.tolist() == [1, 2]
    assert entropy[0].item() == pytest.approx(numpy.log(2))
    model = load_model(make_pico_checkpoint("llama", tmp_path / "m"), device="cpu")
    model.lm_head.weight.data[5] = torch.nan
    with pytest.raises(UserError, match="p1#0"):
        confidence.score_traces(model, some_traces()[1:2] * 2)


def test_the_models_body_is_its_own_again_after_an_error(tmp_path):
    model = load_model(make_pico_checkpoint("llama", tmp_path / "m"), device="cpu")
    first = confidence.score_traces(model, some_traces())
    with pytest.raises(IndexError):
        confidence.score_traces(model, [RenderedTrace("p", 0, [1, 2, 10_000], 1)])
    assert "forward" not in vars(model.base_model)
    again = confidence.score_traces(model, some_traces())
    assert all((a.log_probability == b.log_probability).all() for a, b in zip(first, again, strict=True))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads peak memory as Linux reports it")
def test_a_long_trace_never_holds_its_logits(tmp_path):
    # 1,024 tokens × 152k entries of float32 are 623 MB; the whole is measured in a process of its own.
    make_pico_checkpoint("llama", tmp_path / "m", vocab_size=152_000)
    code = f"""
import resource
from motkit.analysis import confidence
from motkit.analysis.models import load_model
from motkit.render import RenderedTrace
model = load_model({str(tmp_path / "m")!r}, device="cpu")
confidence.score_traces(model, [RenderedTrace("w", 0, list(range(50)), 1)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
confidence.score_traces(model, [RenderedTrace("p", 0, list(range(1024)), 1)])
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(told.stdout) < 200e6


def byte_tokenizer():
    """One token per byte: every character outside ASCII is several."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({sign: place for place, sign in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def test_characters_stay_whole():
    tokenizer, text = byte_tokenizer(), "so é = 日本 🙂!"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    pieces = confidence.token_pieces(tokenizer, ids)
    assert [piece for _, piece in pieces] == list(text)
    assert [count for count, _ in pieces] == [len(sign.encode()) for sign in text]
    cut = confidence.token_pieces(tokenizer, ids[:-3])  # inside the face
    assert "".join(piece for _, piece in cut).rstrip("\ufffd") == text[:-2]
    assert sum(count for count, _ in cut) == len(ids) - 3


def test_words_and_kinds():
    text = "So 12+3=15, wait: we **start** \\boxed{15}</think>"
    kinds = confidence.classify(text)
    found = {}
    for word, kind in kinds:
        if word:
            found.setdefault(word, kind)
    assert {word for word, kind in found.items() if kind == "connective"} == {"so", "wait"}
    assert {word for word, kind in found.items() if kind == "word"} == {"we", "start"}
    assert {"12+3=15", "15"} <= {word for word, kind in found.items() if kind == "number"}
    assert {",", ":", "\\boxed", "{", "}", "</think>"} <= {word for word, kind in found.items() if kind == "formatting"}


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    before = make_pico_checkpoint("llama", folder / "before", seed=0)
    after = make_pico_checkpoint("llama", folder / "after", seed=1)
    tokenizer = pico_tokenizer()

    def trace(number, text):
        ids = tokenizer("ask" + text)["input_ids"] + [tokenizer.eos_token_id]
        return RenderedTrace(f"p{number}", 0, ids, 3)

    teachers = {
        "plain": [trace(n, f"so {n}+1") for n in range(6)],
        "loud": [trace(n, f"so {n}+1 <script>alert('{n}')</script> zz") for n in range(6)],
    }
    return confidence.compute_tokens(before, after, teachers, progress=False), teachers


def test_the_table_of_tokens(scored):
    tokens, teachers = scored
    assert len(tokens) == sum(trace.num_completion_tokens for some in teachers.values() for trace in some)
    change = numpy.exp(tokens["log_p_after"]) - numpy.exp(tokens["log_p_before"])
    numpy.testing.assert_allclose(tokens["delta_p"], change)
    loud = tokens[(tokens["set"] == "loud") & (tokens["problem_id"] == "p2")]
    assert "".join(loud["text"]) == "so 2+1 <script>alert('2')</script> zz<|im_end|>"
    use = dict(zip(loud["text"], loud["token_use"], strict=True))
    assert use["s"] == "all"
    assert use["z"] == "one"
    # 's' of 'script' is a token that all teachers write, in a word that one teacher writes
    in_script = loud[(loud["word"] == "script") & (loud["text"] == "s")]
    assert set(in_script["token_use"]) == {"all"}
    assert set(in_script["word_use"]) == {"one"}


def test_groups_count_every_token_once(scored):
    tokens, _ = scored
    groups = confidence.compute_groups(tokens, fell=-0.001, rose=0.001)
    for split, part in groups.groupby("split"):
        assert part["count"].sum() == len(tokens)
        assert part["share_of_fallen"].sum() == pytest.approx(1)
        for row in part.to_dict(orient="records"):
            chosen = tokens[tokens[split] == row["group"]]
            assert row["delta_p"] == pytest.approx(chosen["delta_p"].mean())
            assert row["share_of_fallen"] == pytest.approx(
                (chosen["delta_p"] <= -0.001).sum() / (tokens["delta_p"] <= -0.001).sum()
            )
            assert row["delta_log_p_low"] <= row["delta_log_p"] <= row["delta_log_p_high"]


def test_the_bootstrap_draws_traces():
    """One id, once in each of 400 traces: the interval is the normal one. Ten times in each: no narrower."""
    draw = numpy.random.default_rng(0)
    change = draw.normal(0.1, 0.3, size=400)

    def table(repeats):
        number = numpy.repeat(numpy.arange(400), repeats)
        rows = {"set": "a", "problem_id": [f"p{n:03d}" for n in number], "sample": 0, "token_id": 7, "text": "x"}
        delta = numpy.repeat(change, repeats)
        return pandas.DataFrame(
            rows | {"p_before": 0.5, "p_after": 0.5 + delta, "delta_p": delta, "delta_log_p": 2 * delta}
        )

    half = 1.96 * change.std(ddof=1) / numpy.sqrt(400)
    for repeats in (1, 10):
        (row,) = confidence.summarise_tokens(table(repeats), draws=4000).to_dict(orient="records")
        assert row["count"] == 400 * repeats
        assert row["delta_p"] == pytest.approx(change.mean())
        assert (row["delta_p_high"] - row["delta_p_low"]) / 2 == pytest.approx(half, rel=0.08)
        assert row["delta_log_p_low"] == pytest.approx(2 * row["delta_p_low"])
    assert confidence.summarise_tokens(table(1), minimum_count=401).empty


def test_the_page_escapes_what_teachers_wrote(scored):
    tokens, _ = scored
    tokens = tokens.copy()
    tokens.loc[tokens["text"] == "z", "text"] = "\u202e\x07<b>"
    groups, summary = confidence.compute_groups(tokens), confidence.summarise_tokens(tokens, minimum_count=2)
    page = confidence.confidence_page(tokens, before="<base>", after="MoT", summary=summary, groups=groups)
    assert "<script" not in page
    assert "<b>" not in page
    assert "<base>" not in page
    assert "\u202e" not in page
    assert "&lt;base&gt;" in page
    assert "http" not in page


def test_the_terminal_view_keeps_the_text(scored):
    tokens, _ = scored
    trace = confidence.pick_trace(tokens, "loud/p3#0")
    assert confidence.terminal_view(trace).plain == "so 3+1 <script>alert('3')</script> zz<|im_end|>"
    with pytest.raises(UserError, match="no such trace"):
        confidence.pick_trace(tokens, "loud/p99#0")


def test_marks_follow_the_change(scored):
    tokens, _ = scored
    trace = confidence.pick_trace(tokens, "plain/p0#0").copy()
    trace["delta_p"] = [-0.5, 0.5, 0, *[0.0] * (len(trace) - 3)]
    marks = [piece.mark for piece in confidence.trace_pieces(trace)]
    assert marks[:3] == ["fell", "rose", ""]
    view = confidence.terminal_view(trace)
    assert [str(span.style) for span in view.spans] == ["red underline", "blue bold"]
    assert confidence.trace_html(trace).count('<span class="fell"') == 1


def test_tokens_are_written_whole_as_parquet_or_csv(scored, tmp_path):
    tokens, _ = scored
    confidence.write_tokens(tokens, tmp_path / "t.parquet")
    confidence.write_tokens(tokens, tmp_path / "t.csv")
    pandas.testing.assert_frame_equal(pandas.read_parquet(tmp_path / "t.parquet"), tokens, check_dtype=False)
    back = pandas.read_csv(tmp_path / "t.csv", keep_default_na=False, float_precision="round_trip")
    pandas.testing.assert_frame_equal(back, tokens, check_dtype=False, check_exact=True)
    with pytest.raises(UserError, match="parquet"):
        confidence.write_tokens(tokens, tmp_path / "t.xlsx")
