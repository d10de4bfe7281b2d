"""What is read: regular files of a bounded size. Nothing waits for a pipe or reads a device to its end."""

import os
import tracemalloc

import pytest

from gnnmoe.config import brief
from gnnmoe.hypergraph.strategies import static_hyperedges
from gnnmoe.reading import read_bytes


def test_the_contents_of_a_file_up_to_the_bound(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"12345678")
    assert read_bytes(path, most=8) == b"12345678"
    with pytest.raises(OSError, match="it has more than 0 MiB"):
        read_bytes(path, most=7)
    tracemalloc.start()
    assert read_bytes(path, most=2**36) == b"12345678"
    assert tracemalloc.get_traced_memory()[1] < 2**22, "a bound is no memory"
    tracemalloc.stop()


@pytest.mark.parametrize("kind", ["pipe", "device", "large", "folder", "circle"])
def test_what_is_no_file_of_a_normal_size_is_refused(tmp_path, kind):
    path = tmp_path / "edges.json"
    make = {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"),
            "large": lambda: (path.touch(), os.truncate(path, 2**30)), "folder": path.mkdir,
            "circle": lambda: path.symlink_to(path)}  # fmt: skip
    why = {"pipe": "it is a pipe or a device", "device": "it is a pipe or a device",
           "large": "more than 64 MiB", "folder": "Is a directory",
           "circle": "Too many levels of symbolic links"}  # fmt: skip
    make[kind]()
    with pytest.raises(
        ValueError, match=rf"edges\.json: the file of hyperedges cannot be read \(.*{why[kind]}"
    ):
        static_hyperedges(4, f"file:{path}")


def test_a_value_in_a_message_is_short():
    deep = []
    for _ in range(10_000):
        deep = [deep]
    assert brief("x" * 100) == f"'{'x' * 34}…"
    assert brief(10**5000) == "a value of type int that is too long to show"
    assert brief(deep) == "a value of type list that is too long to show"
