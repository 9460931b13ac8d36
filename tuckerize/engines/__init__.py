"""Tucker checkpoints in serving engines and training frameworks, one module or package for each."""
