"""Generating token by token with a cache that forgets only what can be forgotten."""

from farlight.decoding.cache import KVCache
from farlight.decoding.decode import decode

__all__ = ["KVCache", "decode"]
