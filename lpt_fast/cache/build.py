"""Filling caches: the loop that computes and writes what is missing (plan.py says what)."""

from __future__ import annotations

import base64
import secrets
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from . import quantize
from .build_settings import BuildReport, BuildSettings, check_room
from .errors import CacheError, reason
from .folder import MANIFEST, Folder, ShardEntry
from .forward import Runner, batches_of
from .index import KeyTable
from .lock import building, sigterm_as_exit
from .plan import Target, plan_shards, shard_tokens
from .ranks import Ranks, wait_until
from .reader import RowReader
from .rows import DatasetKeys, Text, TextRules, to_text
from .shard import shard_name
from .writer import FULL, CacheWriter

CALIBRATION_TOKENS = 16384  # that an int8c store takes its channel scales from


class Builder:
    """Fills one or several caches of one model with the missing rows of a data set.

    Args:
        targets: the caches, of different cuts of one model with one store and compute dtype.
        dataset: tokenised examples, by number.
        keys: of the data set.
        rules: of the model.
        settings: how.
        sources: readers of exact caches of lower cuts, deepest first.
    """

    def __init__(
        self,
        targets: list[Target],
        dataset,
        keys: DatasetKeys,
        rules: TextRules,
        settings: BuildSettings,
        sources: list[tuple[int, RowReader, KeyTable]] = (),
    ):
        self.targets, self.dataset, self.keys = targets, dataset, keys
        self.rules, self.settings, self.sources = rules, settings, sources
        self.ranks = Ranks.of_environment()
        self.report = BuildReport(rows=len(keys), unique=int(keys.first.sum()))

    def run(self) -> BuildReport:
        """Computes and writes what is missing.

        Raises:
            CacheBusyError: somebody else builds.
            CacheError: no room, rows that are not finite, a folder that cannot be written.
        """
        start = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(sigterm_as_exit())
            plan = self.ranks.agree(lambda: self._prepare(stack))
            if not plan:
                return self.report
            self._take(plan)
            tokens = sum(int(self.keys.lengths[t.missing].sum()) for t in self.targets)
            width = self.targets[0].folder.identity.token_bytes
            limit = shard_tokens(width, tokens, self.ranks.world, self.settings.shard_bytes)
            wanted = np.logical_or.reduce([t.missing for t in self.targets])
            shards = plan_shards(self.keys, wanted, limit)
            self._fill(shards, plan["run"])
            self._seal(shards)
        self.report.seconds = time.perf_counter() - start
        return self.report

    # -- before ------------------------------------------------------------------------------------

    def _prepare(self, stack: ExitStack) -> dict:
        """Rank 0's part: takes the locks, tidies up, looks what is there. What the others need;
        nothing where there is nothing to do.
        """
        lacking = [target.find_missing(self.keys).any() for target in self.targets]
        if not any(lacking) and all(target.state.sealed for target in self.targets):
            return {}
        try:
            for target in sorted(self.targets, key=lambda t: t.folder.path):
                self._begin(target, stack)
        except CacheError:
            if any(lacking):
                raise
            return {}  # all rows are there; an index that names them is for who may write it
        check_room(self.targets, self.keys, self.settings)
        plan: dict = {"run": secrets.token_hex(4), "missing": {}, "scale": {}}
        for target in self.targets:
            layer = str(target.place.layer)
            folder = target.folder
            if folder.identity.store == "int8c" and folder.channel_scale is None:
                folder.channel_scale = self._calibrate(target)
            if not (folder.path / MANIFEST).exists():
                try:
                    folder.write_manifest()
                except OSError as error:
                    raise _cannot_write(folder.path, error) from None
            plan["missing"][layer] = _encode(np.packbits(target.missing))
            if folder.channel_scale is not None:
                plan["scale"][layer] = _encode(folder.channel_scale)
        return plan

    def _begin(self, target: Target, stack: ExitStack) -> None:
        """Takes the lock of a cache; everything that was known of it may be old by then."""
        folder = target.folder
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(building(folder.path, self.settings.wait))
            for name in folder.part_names():  # of builds that died
                (folder.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(folder.path, error) from None
        if (folder.path / MANIFEST).exists():
            known = Folder.read(folder.path)
            if known.identity.digest != folder.identity.digest:
                raise CacheError(f"{folder.path} holds another cache; take it away.")
            folder.channel_scale, folder.provenance = known.channel_scale, known.provenance
        target.state.check_there()
        target.state.load(adopt=True)
        target.find_missing(self.keys)

    def _take(self, plan: dict) -> None:
        for target in self.targets:
            layer = str(target.place.layer)
            bits = np.unpackbits(_decode(plan["missing"][layer], np.uint8), count=len(self.keys))
            target.missing = bits.astype(bool)
            if layer in plan["scale"]:
                target.folder.channel_scale = _decode(plan["scale"][layer], np.float32)

    def _calibrate(self, target: Target) -> np.ndarray:
        """Channel scales from texts spread over all lengths of the data set."""
        if self.ranks.world > 1 and self._in_parts():
            raise CacheError(
                "The store is int8c, whose scales one process computes, and the model lies in "
                "parts on several (shard_frozen), expected it whole; take another store."
            )
        rows = np.flatnonzero(target.missing)  # each text once
        keys, lengths, kinds = self.keys.keys[rows], self.keys.lengths[rows], self.keys.kinds[rows]
        step = max(1, int(lengths.sum()) // CALIBRATION_TOKENS)
        rows = rows[np.lexsort((keys[:, 0], lengths, kinds))][::step]
        runner = self._runner([target.place.layer])
        budget = runner.budget(self.settings.batch_tokens)
        parts, names = [], []
        for kind in np.unique(self.keys.kinds[rows]):
            chosen = rows[self.keys.kinds[rows] == kind]
            for batch in batches_of(self.keys.lengths[chosen], budget):
                (state,) = runner.run(self._texts(chosen[batch])).values()
                parts.append(state.float().cpu())
                names += np.repeat(chosen[batch], self.keys.lengths[chosen[batch]]).tolist()
        hidden = torch.cat(parts)
        quantize.check_finite(
            hidden.abs().amax(1), "int8c", lambda token: f"row {names[token]} of the data set"
        )
        return quantize.calibrate(hidden).numpy()

    # -- the loop ----------------------------------------------------------------------------------

    def _runner(self, layers: list[int]) -> Runner:
        target = self.targets[0]
        return Runner(target.place, layers, target.folder.identity.compute_dtype)

    def _texts(self, rows: np.ndarray) -> list[Text]:
        texts = []
        for row in rows.tolist():
            text = to_text(row, self.dataset[row], self.rules)
            if np.frombuffer(text.key, np.uint64).tolist() != self.keys.keys[row].tolist():
                raise CacheError(
                    f"Row {row} of the data set is another text when it is read again, expected "
                    "the same; take random transforms out of the data set."
                )
            texts.append(text)
        return texts

    def _fill(self, shards: list[np.ndarray], run: str) -> None:
        from tqdm import tqdm

        mine = shards[self.ranks.rank :: self.ranks.world]
        run = f"{run}-{self.ranks.rank}"
        runner = self._runner([t.place.layer for t in self.targets])
        writers = [CacheWriter(target.folder, run) for target in self.targets]
        bar = tqdm(
            total=sum(map(len, mine)),
            unit="row",
            desc="Precompute",
            disable=not (self.settings.progress and self.ranks.rank == 0),
        )
        try:
            for rows in mine:
                self._fill_shard(rows, runner, writers, bar)
            self._run_along(shards, runner)
            for writer, target in zip(writers, self.targets, strict=True):
                for entry in writer.close():
                    self._add(target, entry)
        except BaseException:
            for writer, target in zip(writers, self.targets, strict=True):
                writer.abort()
                for entry in writer.entries:
                    self._add(target, entry)
            self._save_index()
            raise
        finally:
            bar.close()
            self.report.bytes = sum(writer.bytes for writer in writers)

    def _fill_shard(self, rows: np.ndarray, runner: Runner, writers: list, bar) -> None:
        texts = self._texts(rows)
        names = [f"row {row} of the data set" for row in rows.tolist()]
        lengths = self.keys.lengths[rows]
        source = self._source_of(rows)
        begun = [False] * len(writers)
        for batch in batches_of(lengths, runner.budget(self.settings.batch_tokens)):
            if source is None:
                states = runner.run(texts[batch])
            else:
                layer, reader, numbers = source
                hidden = reader.read(numbers[batch]).padded()
                states = runner.run(texts[batch], layer, hidden)
                self.report.continued_from = layer
            for i, (target, writer) in enumerate(zip(self.targets, writers, strict=True)):
                lacks = target.missing[rows]
                here = np.flatnonzero(lacks[batch])
                if len(here) == 0:
                    continue
                hidden = states[target.place.layer]
                if len(here) < len(lacks[batch]):
                    kept = torch.from_numpy(np.repeat(lacks[batch], lengths[batch]))
                    hidden = hidden[kept.to(hidden.device)]
                begin = None
                if not begun[i]:
                    all_ = np.flatnonzero(lacks)
                    begin = [texts[j] for j in all_], [names[j] for j in all_]
                    begun[i] = True
                writer.put(hidden, len(here), begin)
            self.report.computed += len(texts[batch])
            self.report.tokens += int(lengths[batch].sum())
            bar.update(len(texts[batch]))
            if not bar.disable and (elapsed := bar.format_dict["elapsed"]) > 0:
                written = sum(writer.bytes for writer in writers) / 1e6
                rate = self.report.tokens / elapsed
                bar.set_postfix_str(f"{rate:,.0f} tokens/s, {written:,.0f} MB", refresh=False)

    def _run_along(self, shards: list[np.ndarray], runner: Runner) -> None:
        """A model that lies in parts on all processes (fsdp.py) runs on all of them together: those
        that are done run along, as often as the one that has most to do.
        """
        if self.ranks.world == 1 or not self._in_parts():
            return
        budget, counts = runner.budget(self.settings.batch_tokens), []
        for rank in range(self.ranks.world):
            lengths = [self.keys.lengths[rows] for rows in shards[rank :: self.ranks.world]]
            counts.append(sum(len(list(batches_of(each, budget))) for each in lengths))
        text = self._texts(shards[-1][-1:])
        for _ in range(max(counts) - counts[self.ranks.rank]):
            runner.run(text)

    def _in_parts(self) -> bool:
        return any(hasattr(p, "full_tensor") for p in self.targets[0].place.lower.parameters())

    def _source_of(self, rows: np.ndarray):
        """The deepest exact cache of a lower cut that has all these rows, and their numbers
        there.
        """
        if self._in_parts():
            return None  # all processes have to run the same layers
        for layer, reader, table in self.sources:
            numbers = table.find(self.keys.keys[rows])
            if (numbers >= 0).all():
                return layer, reader, numbers
        return None

    # -- after -------------------------------------------------------------------------------------

    def _add(self, target: Target, entry: ShardEntry) -> None:
        if entry.name not in target.state.entries:
            target.state.shards[entry.name] = target.folder.read_shard(entry.name, entry)
            target.state.entries[entry.name] = entry

    def _save_index(self) -> None:
        """After a failure: what is finished should be named, but the failure counts for more."""
        if self.ranks.rank == 0:
            for target in self.targets:
                try:
                    target.folder.write_index(target.state.entries.values())
                except OSError:
                    continue

    def _planned_names(self, target: Target, shards: list[np.ndarray]) -> list[str]:
        digest, names = target.folder.identity.digest, []
        for rows in shards:
            rows = rows[target.missing[rows]]
            if len(rows):
                names.append(shard_name(digest, self.keys.keys[rows]))
        return names

    def _seal(self, shards: list[np.ndarray]) -> None:
        """Rank 0 waits for the shards of all and writes the index; the others wait for that."""
        paths = [target.folder.path for target in self.targets]
        if self.ranks.world > 1:
            planned = [self._planned_names(target, shards) for target in self.targets]

            def all_there() -> bool:
                # (A damaged file may have the name of a shard that is being made again.)
                return all(
                    target.state.take(name)
                    for target, names in zip(self.targets, planned, strict=True)
                    for name in names
                )

            def all_named() -> bool:
                for target, names in zip(self.targets, planned, strict=True):
                    named = {entry.name for entry in target.folder.read_index() or ()}
                    if not named.issuperset(names):
                        return False
                return True

            # (An index of before may name a shard that is being made again: on every rank, what
            # counts first is that it is there and sound.)
            wait_until(all_there, paths, "the shards of the other processes")
            if self.ranks.rank != 0:
                wait_until(all_named, paths, "process 0 to seal the cache")
            for target in self.targets:
                target.state.load(adopt=self.ranks.rank == 0)
        if self.ranks.rank == 0:
            for target in self.targets:
                try:
                    target.folder.write_index(target.state.entries.values())
                except OSError as error:
                    raise _cannot_write(target.folder.path, error) from None


def _cannot_write(path: Path, error: OSError) -> CacheError:
    if error.errno in FULL:
        return CacheError(
            f"There is no room in {path} ({reason(error)}); what is finished stays, so make room "
            "or name another folder and start again."
        )
    return CacheError(
        f"The cache folder {path} cannot be written: {reason(error)}; give a folder that can be "
        "written, or a cache that has all the rows already."
    )


def _encode(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode()


def _decode(text: str, dtype) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype).copy()
