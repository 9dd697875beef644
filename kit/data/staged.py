"""DataModule for a training in stages."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from kit.data.datamodule import ClipDataModule, ClipsOnDevice
from kit.loop import batches_done
from kit.stages import StagePlan, locate, starts


class Unsized:
    """An iterable that begins anew each time, without a length: Lightning takes it for a loader of unknown length."""

    def __init__(self, begin: Callable[[], Iterator[dict]]):
        self.begin = begin

    def __iter__(self) -> Iterator[dict]:
        return self.begin()


class StagedClips(ClipsOnDevice):
    """DataModule with the clips of one stage after another. Its other attributes are those of the current stage's
    DataModule.

    The data leads and `StageSwitch` follows: batches carry the number of their stage as `stage`.

    Args:
        plan: the stages. parts: a DataModule for each. batches: number of batches of each on a rank, if it does not end
            early; as many to a step in all.
    """

    def __init__(self, plan: StagePlan, parts: list[ClipDataModule], batches: list[int]):
        super().__init__()
        self.plan, self.parts, self.planned = plan, parts, batches
        self.stage = 0  # the one being trained
        self.ended: dict[int, int] = {}  # stage -> its batches, if it is over or its end is decided
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
        """Number of batches of each stage, as far as is known."""
        return [self.ended.get(i, n) for i, n in enumerate(self.planned)]

    @property
    def began(self) -> int:
        """Number of batches of the stages before the one being trained."""
        return starts(self.batches)[self.stage]

    def enter(self, stage: int):
        """Switches to another stage; the stages before it keep the lengths they had."""
        self.ended |= {i: self.batches[i] for i in range(stage)}
        self.stage = stage

    def end_stage(self, multiple: int):
        """Ends the stage being trained after the batches that are already under way.

        Their number is rounded up to a multiple of `multiple`, but not beyond what was planned.
        """
        batches = -(-(self.handed_out - self.began) // multiple) * multiple
        self.ended[self.stage] = min(batches, self.batches[self.stage])

    @property
    def finished(self) -> bool:
        """Whether no stage has a batch left."""
        return locate(self.batches, self.batches_done) is None

    @property
    def unreadable(self) -> list[Path | str]:
        return list(dict.fromkeys(path for part in self.parts for path in part.unreadable))

    @property
    def about(self) -> str:
        """Describes the data of all stages in words."""
        return "; then ".join(dict.fromkeys(part.about for part in self.parts))

    @property
    def captions(self) -> set[str]:
        return set().union(*(part.captions for part in self.parts))

    def train_dataloader(self) -> Unsized:
        return Unsized(self._train_batches)

    def val_dataloader(self) -> Unsized:
        return Unsized(lambda: iter(self.parts[self.stage].val_dataloader()))

    def _train_batches(self) -> Iterator[dict]:
        self.handed_out = self.batches_done
        while (where := locate(self.batches, self.handed_out)) is not None:
            stage, self.parts[where[0]].batches_done = where
            for batch in self.parts[stage].train_dataloader():
                self.handed_out += 1
                yield {**batch, "stage": stage}
                if self.handed_out >= starts(self.batches)[stage + 1]:
                    break

    def position_of(self, batch: int) -> tuple[int, int]:
        """Returns (stage, number in its stream) of a batch, given its number in the training."""
        stage, number = locate(self.batches, batch)
        return stage, self.parts[stage].position_of(number)[1]

    def leave_out(self, places: Iterable[tuple[int, int]]):
        """Leaves out batches of the stages, given by their `position_of`."""
        for stage, number in places:
            self.parts[stage].leave_out([(0, number)])

    def state_dict(self) -> dict:
        """The place in the data: number of batches that training has used, and the stage.

        For each stage also its name, its length if it has ended, the batches left out of it, and its `settings`.
        """
        return {
            "batches_done": batches_done(self.trainer),
            "stage": self.stage, "names": [stage.name for stage in self.plan.stages], "ended": dict(self.ended),
            "left_out": [sorted(part.left_out) for part in self.parts],
            "settings": [part.settings for part in self.parts],
        }  # fmt: skip

    def check_state(self, state: dict):
        """Checks whether `load_state_dict` can restore a place in the data.

        Raises:
            ValueError: if the stages that are over, or the one it was in, have other names now, or a step has another number
                of batches: the place in the data is counted in batches.
        """
        begun = [stage.name for stage in self.plan.stages[: state["stage"] + 1]]
        if (before := state.get("names", begun)[: state["stage"] + 1]) != begun:
            raise ValueError(f"the stages begun so far were {', '.join(before)}, now {', '.join(begun)}: those must stay")
        now = self.planned[0] // self.plan.stages[0].steps
        for settings in state.get("settings", ()):
            if (then := settings.get("batches_of_a_step", now)) != now:
                raise ValueError(f"a step had {then} batches on each device, now {now}: in stages that cannot change")

    def load_state_dict(self, state: dict):
        """Restores the place in the data, from a state for which `check_state` holds."""
        self.batches_done, self.stage, self.ended = state["batches_done"], state["stage"], dict(state["ended"])
        if (done := self.batches_done - self.began) > self.batches[self.stage]:  # the stage has fewer steps now
            self.ended[self.stage] = done
        for part, left_out in zip(self.parts, state.get("left_out", ())):
            part.left_out |= set(left_out)
        for part, began in zip(self.parts, state.get("settings", ())):
            part.tell_changes(began)
