"""The KV cache of a whole model as one half of its layers must see it."""

from __future__ import annotations

from transformers import Cache


class CacheView(Cache):
    """The layers start..stop of a cache.

    Layers above the insertion hold m more entries than those below, and masks and lengths are read
    from the cache, so each half has to read its own layers. The attention modules go on to write
    under their own layer numbers.

    Args:
        cache: the whole model's cache.
        start, stop: as of a slice of its layers.
    """

    def __init__(self, cache: Cache, start: int, stop: int | None):
        # Not Cache.__init__: it would make layers, and these are somebody else's.
        self._cache = cache
        self._slice = slice(start, stop)

    @property
    def layers(self) -> list:
        return self._cache.layers[self._slice]

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._cache, name)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return self._cache.update(key_states, value_states, layer_idx, *args, **kwargs)
