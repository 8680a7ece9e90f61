"""Runs a recipe in a process of its own that kills itself (SIGKILL) at a named moment.

python crash_driver.py RECIPE RUN MOMENT
"""

import os
import signal
import sys
from pathlib import Path

from motkit import merge, rounds, rundir, spans, train
from motkit.recipe import load_recipe


def die(*arguments, **keywords):
    os.kill(os.getpid(), signal.SIGKILL)


def in_training(step=3, occurrence=2):
    """In the step after a trainer checkpoint, of the second branch."""
    original, seen = train._StepLog.add, []

    def add(self, number, logs):
        seen.extend([number] if number == step else [])
        if len(seen) == occurrence:
            die()
        return original(self, number, logs)

    train._StepLog.add = add


def in_checkpoint_write():
    """Half of optimizer.pt is on the disk."""
    import torch

    original = torch.save

    def save(value, file, *arguments, **keywords):
        original(value, file, *arguments, **keywords)
        if str(file).endswith("optimizer.pt"):
            os.truncate(file, os.path.getsize(file) // 2)
            die()

    torch.save = save


def before_seal():
    train._seal = die


def in_merge():
    """Some of the merged weights are written."""
    original, calls = spans.Targets.write, []

    def write(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            die()
        original(*arguments)

    spans.Targets.write = write


def after_merged_weights():
    """The merged weights are written, config and tokenizer are not."""
    merge._write_config = die


def before_rename(name="merged"):
    original = rundir.move_into_place

    def move(partial, target):
        if target.name == name:
            die()
        original(partial, target)

    rundir.move_into_place = move


def after_branch():
    """The first branch is published, its trainer's checkpoints are still there."""
    original = rounds.shutil.rmtree

    def rmtree(path, *arguments, **keywords):
        if str(path).endswith(".training"):
            die()
        original(path, *arguments, **keywords)

    rounds.shutil.rmtree = rmtree


def between_stages():
    """After the merge of round 1, before its evaluation."""
    original = rounds._Run.evaluate

    def evaluate(self, number, models):
        if number == 1:
            die()
        original(self, number, models)

    rounds._Run.evaluate = evaluate


MOMENTS = {
    "training": in_training,
    "checkpoint write": in_checkpoint_write,
    "before seal": before_seal,
    "merge": in_merge,
    "after merged weights": after_merged_weights,
    "before rename": before_rename,
    "before publishing": lambda: before_rename("published"),
    "after branch": after_branch,
    "between stages": between_stages,
}


def before_pruning():
    """Round 1 is merged and scored, its branches are whole."""
    rounds.rundir.prune_checkpoint = die


def pruning_is_noted():
    """The first branch's stage says that it is pruned, its checkpoint is still there."""
    original = rundir.write_json

    def write_json(target, value):
        original(target, value)
        if target.name == "pruned.json":
            die()

    rundir.write_json = write_json


def in_pruning(occurrence=2):
    """The second branch's checkpoint has lost its name and half of its files."""
    original, seen = rundir.shutil.rmtree, []

    def rmtree(path, *arguments, **keywords):
        if str(path).endswith(".pruned"):
            seen.append(path)
            if len(seen) == occurrence:
                for file in sorted(path.iterdir())[::2]:
                    file.unlink()
                die()
        original(path, *arguments, **keywords)

    rundir.shutil.rmtree = rmtree


# For a recipe that prunes.
PRUNING_MOMENTS = {"before pruning": before_pruning, "pruning is noted": pruning_is_noted, "in pruning": in_pruning}

if __name__ == "__main__":
    recipe, run, moment = sys.argv[1:]
    (MOMENTS | PRUNING_MOMENTS)[moment]()
    rounds.run_rounds(load_recipe(Path(recipe)), run, progress=False)
