"""``python -m entropy_fast``: the command line."""

from entropy_fast.cli import main

if __name__ == "__main__":
    main()
