"""Loads this checkpoint with trust_remote_code=True, as `import tuckerize` does."""

import transformers

# Makes transformers know the format; a folder of that name, which is no package, has no version.
from tuckerize import __version__  # noqa: F401


class DeepseekV2ForCausalLM(transformers.DeepseekV2ForCausalLM):
    """The stock model; only its experts' modules are others."""

    @classmethod
    def is_custom_code(cls):
        """Its dense layers are read as those of the stock model."""
        return False
