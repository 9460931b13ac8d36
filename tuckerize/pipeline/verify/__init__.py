"""Verification of a Tucker checkpoint and of its shards on the devices that will run them."""

from tuckerize.pipeline.verify.verification import Verification, verify

__all__ = ["Verification", "verify"]
