"""`python -m tuckerize`, also under torchrun."""

from tuckerize.cli import main

if __name__ == "__main__":
    main()
