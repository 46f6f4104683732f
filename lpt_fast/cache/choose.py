"""Which of the caches in a folder is meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .errors import CacheError
from .folder import MANIFEST, Folder, find_folders
from .identity import Identity
from .state import State

# Where a model is given without a store, the first of these that is there.
STORES_IN_ORDER = ("bf16", "fp32", "fp16", "int8c", "fp8")


def name_of(identity: Identity) -> str:
    """A cache in words."""
    return (
        f"{identity.content.get('backbone')} {identity.digest[:12]} at layer {identity.layer}, "
        f"computed in {identity.compute_dtype}, kept as {identity.store}"
    )


def _listed(path: Path) -> str:
    names = []
    for folder in find_folders(path):
        own = Folder.read(folder).identity
        names.append(f"{own.digest[:12]}: layer {own.layer}, {own.store}")
    return "; ".join(names) or "it holds none"


def only_folder(root: Path, fits: Callable[[Identity], bool], needed: bool) -> Folder | None:
    """The one cache below `root` that fits; None where none does and none is needed.

    Raises:
        CacheError: several fit, or none does and one is needed.
    """
    folders = [Folder.read(path) for path in (find_folders(root) if root.is_dir() else [])]
    found = [folder for folder in folders if fits(folder.identity)]
    if len(found) == 1:
        return found[0]
    if found or needed:
        raise CacheError(
            f"{root} holds {len(found)} caches that fit, expected one ({_listed(root)}); say which "
            "by model, insertion_layer, store or identity."
        )
    return None


def folder_of_model(
    root: Path, wanted: Identity, store: str | None, asked: str
) -> tuple[Identity, Folder | None]:
    """The cache of a model, and its folder where there is one already.

    Args:
        root: folder of caches, or that of one.
        wanted: the model's, in any store.
        store: the only one that will do; None: any.
        asked: what the digest has to begin with.

    Raises:
        CacheError: `root` is the cache of another model, or `asked` no beginning of this one's.
    """
    stores = (store,) if store else STORES_IN_ORDER
    stores = [s for s in stores if wanted.at(store=s).digest.startswith(asked)]
    if not stores:
        raise CacheError(
            f"`identity` is {asked!r}, expected that of this model ({name_of(wanted)}); leave it "
            "out, or open the cache without a model."
        )
    for name in stores:
        own = wanted.at(store=name)
        for path in (root / own.folder, root):
            if not (path / MANIFEST).exists():
                continue
            folder = Folder.read(path)
            if folder.identity.digest == own.digest:
                return own, folder
    if (root / MANIFEST).exists():
        found = Folder.read(root).identity
        raise CacheError(
            f"The cache {root} is that of {name_of(found)}, expected of this model "
            f"({name_of(wanted)}; weights, configuration, layer, dtype or store differ); open "
            "the folder above it, which may hold several, or fill another."
        )
    return wanted.at(store=stores[0]), None


def state_at(root: Path, identity: Identity, provenance: Callable[[], dict]) -> State:
    """What there is of a cache that is to be filled below `root`; a new one knows `provenance()`.

    Raises:
        CacheError: another cache stands in its place.
    """
    path = root / identity.folder
    if (path / MANIFEST).exists():
        folder = Folder.read(path)
        if folder.identity.digest != identity.digest:
            raise CacheError(f"{path} holds another cache; take it away.")
    else:
        folder = Folder(path, identity, provenance())
    state = State(folder)
    if path.is_dir():
        state.load(adopt=False)
    return state
