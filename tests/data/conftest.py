"""Fixtures of the tests of data."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.data.videos import write


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    """A folder of eight videos of different length, so that their clips differ."""
    root = tmp_path_factory.mktemp("videos")
    for i in range(8):
        write(root / f"{'walk' if i % 2 else 'wave_hand'}_{i:03d}.mp4", count=30 + 4 * i)
    (root / "notes.txt").write_text("ignored")
    return root
