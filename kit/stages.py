"""Stages of a training: what each trains on and for how long, and which stage a step belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

from kit.values import check_positive, check_whole_number, from_values


@dataclass(frozen=True)
class Stage:
    """Stage of a training. Values that it does not set are as in the rest of the config.

    Args:
        name: name of the stage, and of the checkpoint at its end.
        steps: optimizer steps; with `patience`, at most.
        data: values of the config's `data`, such as frames, height, width, fps, image_share, batch_size or batch_tokens. Of
            its source too: single values, or a source of another `_target_` in its place.
        lr, warmup: peak of its learning rate, and steps to reach it; then a cosine to 1 % at its last step.
        train: prefixes of the names of the parameters that are trained; the others are frozen. None: all.
        patience: number of validations without improvement after which it ends; None: it ends after its steps.
    Raises:
        ValueError: if a number is out of range.
    """

    name: str
    steps: int
    data: Mapping = field(default_factory=dict)
    lr: float | None = None
    warmup: int | None = None
    train: tuple[str, ...] | None = None
    patience: int | None = None

    def __post_init__(self):
        for key, least in (("steps", 1), ("warmup", 0), ("patience", 1)):
            check_whole_number(f"stages.{self.name}.{key}", getattr(self, key), least, optional=key != "steps")
        check_positive(f"stages.{self.name}.lr", self.lr, optional=True)
        if self.train is not None and (isinstance(self.train, str) or not self.train):
            raise ValueError(
                f"stages.{self.name}.train={self.train}; expected beginnings of names, such as [head], or null: all"
            )
        if not isinstance(self.data, Mapping):
            raise ValueError(f"stages.{self.name}.data={self.data}; expected keys and values of data")
        if self.name in ("last", "best"):
            raise ValueError(
                f"stages.{self.name}: a stage leaves a checkpoint of its name, and {self.name}.ckpt is another's"
            )


@dataclass(frozen=True)
class StagePlan:
    """Stages in their order."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, values: Mapping[str, Mapping]) -> StagePlan:
        """Builds a plan from plain values: name -> the other values of a `Stage`; None leaves the stage out.

        Raises:
            ValueError: for an unknown key, a stage without steps, or if no stage is left; else as `Stage`.
        """
        stages = []
        for name, stage in values.items():
            if stage is None:  # left out
                continue
            if not isinstance(stage, Mapping) or "steps" not in stage:
                raise ValueError(f"stages.{name} needs steps, how many optimizer steps it has")
            stages.append(from_values(Stage, stage, f"stages.{name}", name=str(name)))
        if not stages:
            raise ValueError("stages: none is left; give one with its steps, or stages=null for a training without")
        return cls(tuple(stages))

    def shortened(self, most: int | None) -> StagePlan:
        """Returns the plan with at most `most` steps in each stage; None: with all.

        Raises:
            ValueError: if `most` is below 1.
        """
        check_whole_number("stage_steps", most, 1, optional=True)
        return self if most is None else StagePlan(tuple(replace(s, steps=min(s.steps, most)) for s in self.stages))

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages, at most."""
        return sum(stage.steps for stage in self.stages)


def starts(lengths: list[int]) -> list[int]:
    """Returns where consecutive parts of these lengths begin, and where the last one ends."""
    return list(accumulate(lengths, initial=0))


def locate(lengths: list[int], position: int) -> tuple[int, int] | None:
    """Returns the number of the part that a position is in, and the position in that part; None after the last part."""
    for number, (start, stop) in enumerate(zip(starts(lengths), starts(lengths)[1:])):
        if position < stop:
            return number, position - start
    return None
