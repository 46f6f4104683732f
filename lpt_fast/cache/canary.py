"""A look before rows are used: a few are computed again and compared.

The identity says that weights and configuration are the same; the canary says that the program
still computes the same from them (another version of a library, another attention implementation, a
broken kernel). Rows differ a little by what else was in their batch; the tolerances below are far
above what was measured (`python -m bench cache`) and far below what a mistake makes.
"""

from __future__ import annotations

import numpy as np
import torch

from .errors import CacheError
from .forward import Runner
from .identity import Identity, Place
from .index import RowTable
from .reader import RowReader
from .rows import Text

ROWS = 4
# Root mean square of the difference over that of the row: from batch composition and the order of
# sums in the computing dtype, and from rounding in the store.
COMPUTE = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 3e-2, "float16": 5e-3}
STORE = {"fp32": 0.0, "fp16": 1e-3, "bf16": 6e-3, "int8c": 6e-2, "fp8": 6e-2}


def tolerance(identity: Identity) -> float:
    """Largest relative difference of a sound row."""
    return COMPUTE[identity.compute_dtype] + STORE[identity.store]


def text_of(table: RowTable, row: int) -> Text:
    """The text of a row, from the cache itself."""
    tokens = table.tokens_of(np.array([row]))
    fields = {"input_ids": table.input_ids[tokens].astype(np.int32)}
    for name in ("token_type_ids", "position_ids"):
        values = getattr(table, name)
        if values is not None and values[tokens[0]] >= 0:
            fields[name] = values[tokens].astype(np.int32)
    return Text(**fields)


def differences(
    place: Place, identity: Identity, table: RowTable, reader: RowReader, rows: np.ndarray
) -> np.ndarray:
    """Relative difference of each row from what the model gives now, float [B]."""
    runner = Runner(place, [identity.layer], identity.compute_dtype)
    out = []
    for row in rows.tolist():
        stored = reader.read(np.array([row])).text().float().cpu()
        now = runner.run([text_of(table, row)])[identity.layer].float().cpu()
        scale = torch.linalg.vector_norm(now)
        out.append(float(torch.linalg.vector_norm(stored - now) / scale))
    return np.array(out)


def check(place: Place, identity: Identity, table: RowTable, reader: RowReader) -> None:
    """Recomputes ROWS rows spread over the cache.

    Raises:
        CacheError: one differs by more than the tolerance.
    """
    if len(table) == 0:
        return
    rows = np.unique(np.linspace(0, len(table) - 1, ROWS).astype(np.int64))
    found = differences(place, identity, table, reader, rows)
    allowed = tolerance(identity)
    if not (found <= allowed).all():  # NaN counts as wrong
        worst = int(np.nan_to_num(found, nan=np.inf).argmax())
        raise CacheError(
            f"Row {rows[worst]} of the cache differs by {found[worst]:.2g} from what this model "
            f"gives now, expected at most {allowed:.2g}: the program computes something else than "
            "when the cache was filled (library versions, attention implementation); fill a new "
            "cache, or pass canary=False if you know why."
        )
