"""``python -m pipeline`` is the command ``prefloop``."""

from pipeline.cli import main

main()
