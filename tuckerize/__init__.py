"""Makes Mixture-of-Experts checkpoints smaller by HOOI Tucker decomposition.

Importing it lets transformers load Tucker checkpoints. Neither torch nor transformers is imported
before the caller does.
"""

from types import ModuleType

from wrapt import register_post_import_hook

from tuckerize.version import __version__

__all__ = ["__version__"]


def _register_with_transformers(_: ModuleType) -> None:
    """Make transformers know the format, as soon as it can be told."""
    import tuckerize.engines.transformers  # noqa: F401


register_post_import_hook(_register_with_transformers, "transformers.quantizers.auto")
