"""motkit: Merge-of-Thought Distillation on top of mergekit and TRL.

From Python, in a notebook as in a script::

    import motkit

    recipe = motkit.load_recipe("recipes/quickstart", ["rounds=2"])
    motkit.generate_traces(recipe, "runs/quickstart")             # where its teachers are models
    table = motkit.run_rounds(recipe, "runs/quickstart")          # a pandas.DataFrame
    motkit.merge_checkpoints("mot", "merged", base="student", branches=["branch-1", "branch-2"])

A fault that the caller can mend is raised as `motkit.UserError`.
"""

from typing import TYPE_CHECKING, Any

from motkit.errors import UserError

if TYPE_CHECKING:
    from motkit.generate import generate_traces
    from motkit.merge import merge_checkpoints
    from motkit.recipe import load_recipe
    from motkit.rounds import run_rounds

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "generate_traces", "load_recipe", "merge_checkpoints", "run_rounds"]


def __getattr__(name: str) -> Any:
    # Each pulls in packages that take seconds to import: only when asked for.
    if name == "load_recipe":
        from motkit.recipe import load_recipe

        return load_recipe
    if name == "generate_traces":
        from motkit.generate import generate_traces

        return generate_traces
    if name == "run_rounds":
        from motkit.rounds import run_rounds

        return run_rounds
    if name == "merge_checkpoints":
        from motkit.merge import merge_checkpoints

        return merge_checkpoints
    raise AttributeError(f"module 'motkit' has no attribute {name!r}")
