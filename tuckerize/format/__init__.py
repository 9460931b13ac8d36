"""On-disk format of Tucker checkpoints and their shards: config.json, manifests, model card."""
