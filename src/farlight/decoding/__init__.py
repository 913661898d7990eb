"""Token-by-token decoding with a key-value cache that evicts exactly the keys that no later query can see."""

from farlight.decoding.cache import KVCache
from farlight.decoding.decode import decode
from farlight.decoding.step import step

__all__ = ["KVCache", "decode", "step"]
