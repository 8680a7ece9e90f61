"""mergekit's own commands with our merge methods in them.

    python -m motkit.mergekit mergekit-yaml config.yaml out
    python -m motkit.mergekit mergekit-multi config.yaml --intermediate-dir work --out-path out
    python -m motkit.mergekit mergekit-pytorch config.yaml out

mergekit has no plugins: a method exists in a process that has imported the module which registers it. This one does,
and hands over to the command with the arguments as they are. None of motkit's checks apply.
"""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "mergekit-yaml": "mergekit.scripts.run_yaml",
    "mergekit-multi": "mergekit.scripts.multimerge",
    "mergekit-pytorch": "mergekit.scripts.merge_raw_pytorch",
}


def main(arguments: Sequence[str]) -> None:
    """Run one of mergekit's commands, named by the first argument; exits with 2 if there is no such one."""
    if not arguments or arguments[0] not in COMMANDS:
        got = f", got {arguments[0]!r}" if arguments else ""
        print(f"Error: expected one of {', '.join(COMMANDS)}{got}", file=sys.stderr)
        raise SystemExit(2)
    import motkit.merge_methods  # noqa: F401  registers our methods

    command = importlib.import_module(COMMANDS[arguments[0]]).main
    command(args=list(arguments[1:]), prog_name=f"python -m motkit.mergekit {arguments[0]}")


if __name__ == "__main__":
    main(sys.argv[1:])
