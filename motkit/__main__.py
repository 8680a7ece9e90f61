"""``python -m motkit``."""

from motkit.cli import main

main()
