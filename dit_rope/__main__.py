"""``python -m dit_rope``: the command, from a checkout too where nothing is installed."""

from .cli import main

if __name__ == "__main__":
    main()
