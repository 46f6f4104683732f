"""The activation cache: outputs of frozen layers, computed once per text (DESIGN section 6). Gives
ActivationCache and its errors. Knows method and backbone: no Trainer, no command line.

identity.py   what rows depend on            rows.py      texts and their keys
shard.py      the file format                folder.py    manifest, index, shards of one cache
index.py      key -> row                     documents.py JSON files with a digest
build.py      which rows are missing         forward.py   from texts to hidden states
writer.py     writing on a thread            reader.py    packed batches, read ahead
planner.py    where to read from             quantize.py  8-bit stores
guards.py     what is refused                canary.py    a few rows computed again
verify.py     verify, repair, gc, export     ranks.py     several processes
lock.py       one builder at a time          choose.py    which cache of a folder is meant
filling.py    what a data set lacks          activation_cache.py  the class for users
"""

from .activation_cache import ActivationCache
from .errors import CacheBusyError, CacheError, CorruptCacheError, MissingRowsError

__all__ = [
    "ActivationCache",
    "CacheBusyError",
    "CacheError",
    "CorruptCacheError",
    "MissingRowsError",
]
