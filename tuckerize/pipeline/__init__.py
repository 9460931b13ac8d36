"""The use cases, one file each: plan, decompose, shard, verify, reconstruct, describe."""
