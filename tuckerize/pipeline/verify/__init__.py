"""Verification of a Tucker checkpoint and of its shards on the devices that will run them."""

from tuckerize.pipeline.verify.command import VerifyRequest, verify

__all__ = ["VerifyRequest", "verify"]
