"""Runs tuckerize from a checkout without installing it: `python cli.py --help`."""

from tuckerize.cli import main

if __name__ == "__main__":
    main()
