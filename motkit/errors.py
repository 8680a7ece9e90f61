"""The one exception for what a user can mend, and a word for its messages."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A fault outside the code: a recipe, a file, a disk, a checkpoint.

    The message is complete on its own: where, what, got against expected, and the remedy, in one line per fault.
    The command line prints it without a traceback and exits with status 2. Every other exception is a bug.
    """


def nearest(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: what may have been meant, else what there is if that is not much."""
    listed = sorted(known)
    close = difflib.get_close_matches(str(name), listed, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(listed)}" if 0 < len(listed) <= 40 else ""
