"""The on-disk contract of Tucker checkpoints and their shards: configuration, manifests, card."""
