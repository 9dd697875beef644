"""UCF-101 (Soomro et al. 2012, arXiv 1212.0402) with its official split lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from kit.data.clips import FolderClips
from kit.files import read_text

LISTS = "ucfTrainTestlist"
CLASSES = 101


def read_list(path: Path) -> list[str]:
    """Reads the videos of a split list, without their suffix.

    A line is `Class/v_Class_g01_c01.avi`; a class number may follow.

    Raises:
        FileNotFoundError: if there is no such list. ValueError: if it is empty or no UTF-8, or a line is not of this form.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"UCF-101's split list {path} is missing; unpack UCF101TrainTestSplits-RecognitionTask.zip there or beside the "
            f"folder of the classes"
        )
    names = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not (words := line.split()):
            continue
        name = PurePosixPath(words[0])
        if len(name.parts) != 2 or len(words) > 2:
            raise ValueError(f"{path}, line {number}: expected `Class/v_Class_g01_c01.avi 1`, found {line!r}")
        names.append(str(name.with_suffix("")))
    if not names:
        raise ValueError(f"UCF-101's split list {path} is empty; unpack it anew")
    return names


@dataclass(eq=False)
class UCF101(FolderClips):
    """UCF-101 as a data set of clips, like `FolderClips`; the class is the folder.

    Layout: `root/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi` and so on; any suffix of a video will do.

    Args:
        split: `train`, the official training list, `val`, the test list, or `all`, both.
        official: number of the official split, 1 to 3; its lists lie in `ucfTrainTestlist`, in `root` or beside it.
    Raises:
        as `FolderClips`; FileNotFoundError also if a list is missing, or videos that it names, by name.
    """

    unused = ("val_every",)

    label_from: str = "folder"
    official: int = 1

    def _files_of_split(self, names: Sequence[str]) -> list[str]:
        if self.official not in (1, 2, 3):
            raise ValueError(f"official={self.official}; UCF-101 has the official splits 1, 2 and 3")
        classes = {PurePosixPath(name).parent.name for name in names}
        if len(classes) != CLASSES:
            raise ValueError(f"{self.root} has videos of {len(classes)} classes, UCF-101 has {CLASSES}; unpack all of it")
        kinds = {"train": ("train",), "val": ("test",), "all": ("train", "test")}[self.split]
        return self._present(names, [n for kind in kinds for n in read_list(self._list(f"{kind}list0{self.official}.txt"))])

    def _list(self, name: str) -> Path:
        inside, beside = self.root / LISTS / name, self.root.parent / LISTS / name
        return beside if beside.is_file() and not inside.is_file() else inside

    def _present(self, names: Sequence[str], wanted: Sequence[str]) -> list[str]:
        """Returns the files of the wanted videos, sorted. Raises: FileNotFoundError if some are missing."""
        found = {f"{(path := PurePosixPath(name)).parent.name}/{path.stem}": name for name in names}
        if missing := [name for name in wanted if name not in found]:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise FileNotFoundError(f"{len(missing)} of {len(wanted)} videos of UCF-101 are not in {self.root}: {some}")
        return sorted(found[name] for name in wanted)
