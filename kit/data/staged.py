"""Clips of a training in stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kit.data.datamodule import ClipDataModule, ClipsOnDevice
from kit.stages import StagePlan, place, starts


class Unsized:
    """What is iterated over anew each time; Lightning takes it for a loader that does not know its length."""

    def __init__(self, begin: Callable[[], Iterator[dict]]):
        self.begin = begin

    def __iter__(self) -> Iterator[dict]:
        return self.begin()


class StagedClips(ClipsOnDevice):
    """Clips of one stage after another. Whatever else a `ClipDataModule` knows, it knows of the stage being trained.

    The data leads and `StageSwitch` follows: batches carry the number of their stage as `stage`.

    Args:
        plan: its stages. parts: a DataModule for each. batches: how many each has, on a rank, where none ends early.
    """

    def __init__(self, plan: StagePlan, parts: list[ClipDataModule], batches: list[int]):
        super().__init__()
        self.plan, self.parts, self.planned = plan, parts, batches
        self.stage = 0  # the one being trained
        self.ended: dict[int, int] = {}  # batches of stages that are over, or whose end is decided
        self.batches_done, self.handed_out = 0, 0

    def __getattr__(self, name: str):
        if name.startswith("__") or "parts" not in self.__dict__:  # while unpickling or copying
            raise AttributeError(name)
        return getattr(self.parts[self.stage], name)

    def setup(self, stage: str):
        for part in self.parts:
            part.trainer = self.trainer
            part.setup(stage)

    @property
    def batches(self) -> list[int]:
        """How many each stage has, as far as is known."""
        return [self.ended.get(i, n) for i, n in enumerate(self.planned)]

    @property
    def began(self) -> int:
        """Batches of the stages before the one being trained."""
        return starts(self.batches)[self.stage]

    def enter(self, stage: int):
        """Goes on with another stage."""
        self.ended |= {i: self.batches[i] for i in range(stage)}
        self.stage = stage

    def end_stage(self, multiple: int):
        """The stage being trained ends with the batches that are already under way, rounded up to a multiple."""
        batches = -(-(self.handed_out - self.began) // multiple) * multiple
        self.ended[self.stage] = min(batches, self.batches[self.stage])

    @property
    def finished(self) -> bool:
        """Whether no stage has a batch left."""
        return place(self.batches, self.batches_done) is None

    @property
    def unreadable(self) -> list[Path]:
        return [path for part in self.parts for path in part.unreadable]

    def train_dataloader(self) -> Unsized:
        return Unsized(self._train_batches)

    def val_dataloader(self) -> Unsized:
        return Unsized(lambda: iter(self.parts[self.stage].val_dataloader()))

    def _train_batches(self) -> Iterator[dict]:
        self.handed_out = self.batches_done
        while (where := place(self.batches, self.handed_out)) is not None:
            stage, self.parts[where[0]].batches_done = where
            for batch in self.parts[stage].train_dataloader():
                self.handed_out += 1
                yield {**batch, "stage": stage}
                if self.handed_out >= starts(self.batches)[stage + 1]:
                    break

    def place_of(self, batch: int) -> tuple[int, int]:
        """(stage, number in its stream) of a batch by its number in the training."""
        stage, number = place(self.batches, batch)
        return stage, self.parts[stage].place_of(number)[1]

    def leave_out(self, places: Iterable[tuple[int, int]]):
        """As of a `ClipDataModule`."""
        for stage, number in places:
            self.parts[stage].leave_out([(0, number)])

    def state_dict(self) -> dict:
        """The place in the data: batches that training has used up, the stage, how long the ones before it were, and what
        was left out of each."""
        return {
            "batches_done": self.trainer.fit_loop.epoch_loop.batch_progress.total.processed,
            "stage": self.stage, "names": [stage.name for stage in self.plan.stages], "ended": dict(self.ended),
            "left_out": [sorted(part.left_out) for part in self.parts],
            "settings": [part.settings for part in self.parts],
        }  # fmt: skip

    def load_state_dict(self, state: dict):
        """
        Raises:
            ValueError: if stages that are over, or the one it was in, are others now, or a step has other batches: the place
                in the data is counted in batches.
        """
        begun = [stage.name for stage in self.plan.stages[: state["stage"] + 1]]
        if (before := state.get("names", begun)[: state["stage"] + 1]) != begun:
            raise ValueError(f"the stages begun so far were {', '.join(before)}, now {', '.join(begun)}: those must stay")
        for part, began in zip(self.parts, state.get("settings", ())):
            now = part.settings["batches_of_a_step"]
            if (then := began.get("batches_of_a_step", now)) != now:
                raise ValueError(f"a step had {then} batches on each device, now {now}: in stages that cannot change")
        self.batches_done, self.stage, self.ended = state["batches_done"], state["stage"], dict(state["ended"])
        if (done := self.batches_done - self.began) > self.batches[self.stage]:  # it has fewer steps now
            self.ended[self.stage] = done
        for part, left_out in zip(self.parts, state.get("left_out", ())):
            part.left_out |= set(left_out)
        for part, began in zip(self.parts, state.get("settings", ())):
            part.tell_changes(began)
