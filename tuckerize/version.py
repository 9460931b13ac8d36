"""Version of the program; its own module, so that lower layers need not import the package."""

__version__ = "0.1.0"
