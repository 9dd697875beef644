"""A source of clips that stops a training midway until a test lets it continue."""

from __future__ import annotations

import time
from pathlib import Path

from kit.data.shapes import Shapes


class Gated(Shapes):
    """Shapes whose training clips from number `at` on wait for the file `gate`; reading one writes `gate`.reached."""

    def __init__(self, *args, gate: str, at: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate, self.at = Path(gate), at

    def __getitem__(self, n):
        if self.split == "train" and n >= self.at and not self.gate.exists():
            reached(self.gate).touch()
            while not self.gate.exists():
                time.sleep(0.01)
        return super().__getitem__(n)


def reached(gate: Path) -> Path:
    return gate.with_name(f"{gate.name}.reached")


def words(gate: Path, at: int) -> list[str]:
    return ["data.source._target_=tests.gated.Gated", f"+data.source.gate={gate}", f"+data.source.at={at}"]
