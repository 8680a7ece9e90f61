"""Token confidence: memory of a 32,768-token trace under a vocabulary of 152k, and speed beside the naive computation.

The naive peer holds all logits at once and takes log-probability, rank and entropy from `torch.log_softmax`, on a size
where that fits. Target: under 1 GB above the model; no less than 0.9 × the peer's speed.

    python tests/benchmarks/bench_confidence.py [--repeats 3]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

VOCABULARY, LONG_TOKENS, SHORT_TOKENS = 152_000, 32_768, 1_024

MEMORY = """
import json, resource, sys, time
from motkit.analysis import confidence
from motkit.analysis.models import load_model
from motkit.render import RenderedTrace
model = load_model(sys.argv[1], device="cpu")
confidence.score_traces(model, [RenderedTrace("warm", 0, list(range(50)), 1)])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
started = time.perf_counter()
confidence.score_traces(model, [RenderedTrace("p", 0, list(range(int(sys.argv[2]))), 1)])
above = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
print(json.dumps({"above_the_model_bytes": above, "seconds": time.perf_counter() - started}))
"""


def naive(model, trace):
    """All logits of the trace at once, in float32."""
    import torch

    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([trace.input_ids]), use_cache=False).logits[0].float()
        log_p = torch.log_softmax(logits[trace.num_prompt_tokens - 1 : -1], -1)
        own = log_p.gather(1, torch.tensor(trace.input_ids[trace.num_prompt_tokens :])[:, None])
        return own[:, 0], (log_p > own).sum(-1) + 1, -(log_p.exp() * log_p).sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    from conftest import make_pico_checkpoint

    from motkit.analysis import confidence
    from motkit.analysis.models import load_model
    from motkit.render import RenderedTrace

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_pico_checkpoint(
            "llama", Path(folder) / "m", vocab_size=VOCABULARY, max_position_embeddings=LONG_TOKENS
        )
        told = subprocess.run(
            [sys.executable, "-c", MEMORY, str(checkpoint), str(LONG_TOKENS)],
            capture_output=True,
            text=True,
            check=True,
        )
        memory = json.loads(told.stdout)
        model = load_model(checkpoint, device="cpu")
        trace = RenderedTrace("p", 0, list(range(SHORT_TOKENS)), 1)
        ours, theirs = [], []
        for repeat in range(options.repeats + 1):
            for times, work in (
                (ours, lambda: confidence.score_traces(model, [trace])),
                (theirs, lambda: naive(model, trace)),
            ):
                started = time.perf_counter()
                work()
                if repeat:  # the first is a warm-up
                    times.append(time.perf_counter() - started)
    speed = sorted(theirs)[len(theirs) // 2] / sorted(ours)[len(ours) // 2]
    above = memory["above_the_model_bytes"] / 1e9
    logits = LONG_TOKENS * VOCABULARY * 4 / 1e9
    took = memory["seconds"]
    print(f"{LONG_TOKENS:,} tokens, vocabulary {VOCABULARY:,}: {above:.2f} GB above the model, {took:.0f} s")
    print(f"(all its logits at once would be {logits:.0f} GB); target: under 1 GB")
    print(f"{SHORT_TOKENS:,} tokens: {speed:.2f} × the speed of the naive computation; target: 0.9 ×")
    if above >= 1 or speed < 0.9:
        sys.exit("a target is missed")


if __name__ == "__main__":
    main()
