"""safetensors and JSON on disk: lazy reading, atomic writing, output folders."""
