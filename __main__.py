"""`python -m cbit`: the command line."""

from .tools.cli import main

if __name__ == "__main__":
    main()
