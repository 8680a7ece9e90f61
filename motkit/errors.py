"""The one exception for what a user can mend."""


class UserError(Exception):
    """A fault outside the code: a recipe, a file, a disk, a checkpoint.

    The message is complete on its own: where, what, got against expected, and the remedy, in one line per fault.
    The command line prints it without a traceback and exits with status 2. Every other exception is a bug.
    """
