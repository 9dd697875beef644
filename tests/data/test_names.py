"""Names and texts in blocks of memory are those of the list or dictionary that they are made of."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import pytest

from kit.data.clips import FolderClips
from kit.data.names import STRIDE, ByName, Names, Texts, texts_by_name

SOME = ["b/2.mp4", "", "a", "Ä\u0301", "😀", "\udcff", "a b", "ab", "aa", "0", "é", "b"]
COUNTS = [0, 1, STRIDE - 1, STRIDE, STRIDE + 1, 5 * STRIDE + 7]


def test_texts_are_a_list_s():
    texts = Texts(iter(SOME))
    assert list(texts) == SOME and len(texts) == len(SOME) and texts == SOME and texts == Texts(SOME)
    assert texts != SOME[1:] and texts != 7 and Texts() == []
    assert repr(Texts(["a", "b"])) == "2 texts: ['a', 'b']" and len(repr(Texts(map(str, range(10**5))))) < 100
    assert texts[-1] == SOME[-1] and texts[2:9:3] == SOME[2:9:3] and texts[::-1] == SOME[::-1]
    for wrong in (len(SOME), -len(SOME) - 1):
        with pytest.raises(IndexError, match=f"of {len(SOME)} texts"):
            texts[wrong]
    assert pickle.loads(pickle.dumps(texts)) == SOME


@pytest.mark.parametrize("count", COUNTS)
def test_names_are_found_where_they_are(count):
    listed = [f"{(n * 7919) % (count or 1)}/{n}.mp4" for n in range(count)]
    for names in (Names(listed), pickle.loads(pickle.dumps(Names(listed)))):
        assert names == listed and [names.index(name) for name in listed] == list(range(count))
        for other in ("", "0", "5/0.mp", "zzz", "\U0010ffff", "3/x"):
            assert other not in names
            with pytest.raises(ValueError, match="not there"):
                names.index(other)
        assert None not in names and 3 not in names
    assert [Names(SOME).index(name) for name in SOME] == list(range(len(SOME)))


def test_a_table_is_its_dictionary():
    texts = {name: f"text of {ascii(name)}" for name in SOME}
    table = texts_by_name(texts)
    assert dict(table) == table.unpacked() == texts
    assert list(table) == list(texts) and list(table.values()) == list(texts.values())
    assert table.get("none", "else") == "else" and "none" not in table and "a" in table and table and not texts_by_name({})
    with pytest.raises(KeyError, match="none"):
        table["none"]
    assert dict(ByName(["x", "y"], [7, None])) == {"x": 7, "y": None}


ROLLUP = Path("/proc/self/smaps_rollup")


def own_memory() -> float:
    """Memory that this process shares with no other, in MiB."""
    return int(re.search(r"Private_Dirty:\s+(\d+)", ROLLUP.read_text())[1]) / 1024


@pytest.mark.skipif(not ROLLUP.exists(), reason="only Linux tells which memory is shared")
def test_a_loader_s_process_copies_no_names_or_captions(tmp_path):
    """Of a list and a dictionary of as many it came to hold 12 MiB of its own."""
    count = 40_000
    for n in range(count):
        os.close(os.open(tmp_path / f"clip_of_some_film_{n:06d}.mp4", os.O_CREAT))
    rows = (f"clip_of_some_film_{n:06d}.mp4,{'what is to be seen in it and where ' * 3}{n}" for n in range(count))
    (tmp_path / "captions.csv").write_text("\n".join(("file,caption", *rows)))
    source = FolderClips(tmp_path, "train", backend="pyav")
    reader, writer = os.pipe()
    if not (child := os.fork()):
        try:
            source.words(source.file(0))
            before = own_memory()
            for n in range(len(source.files)):
                source.words(source.file(n))
            os.write(writer, str(own_memory() - before).encode())
        finally:
            os._exit(0)
    os.close(writer), os.waitpid(child, 0)
    with open(reader) as told:
        grown = float(told.read())
    assert grown < 6
