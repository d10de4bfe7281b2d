"""Hyperedges from a JSON file: what is read, what is refused, and what makes two files one run."""

import re

import pytest

from gnnmoe.config import Refused
from gnnmoe.hypergraph.strategies import static_hyperedges, strategy_identity
from tests.gnnmoe._support import make_coupler

BAD_FILES = {  # for four experts
    "beyond": (b"[[0,1],\n[2,4]]", ", line 2: member 4 is out of range for 4 experts"),
    "negative": (b"\n\n[[0,-1]]", ", line 3: member -1 is out of range for 4 experts"),
    "empty edge": (b"[[0,1]\n,\n[]]", ", line 3: the hyperedge is empty."),
    "doubled member": (b"[[0,\n1],\r\n\r\n[2,2]]", ", line 4: member 2 is there more than once."),
    "doubled edge": (b"[[3],\n[0,1],\n[2],\n[1,\n0]]", ", line 4: hyperedge [0, 1] is in line 2 already."),
    "text": (b'[[0,"1"]]', ', line 1: member "1" is not an integer.'),
    "number": (b"[[0],\n[0, 1.0]]", ", line 2: member 1.0 is not an integer."),
    "bool": (b"[[0],\n\n[0,\ntrue]]", ", line 3: member true is not an integer."),
    "bool beside 1": (b"[[0],\n[1, true]]", ", line 2: member true is not an integer."),
    "1.0 beside 1": (b"[[1, 1.0]]", ", line 1: member 1.0 is not an integer."),
    "deeper": (b"[[[0]]]", ", line 1: member [0] is not an integer."),
    "flat": (b"[\n3]", ", line 2: 3 is not a list; the file must be a list of lists of experts."),
    "object": (b'\n{"0": 1}', ", line 2: not a list; the file must be a list of lists of experts."),
    "comma": (b"[[0,1],\n[1,2]\n[3]]", ", line 3: not JSON (Expecting ',' delimiter)."),
    "nothing": (b"", ", line 1: not JSON (Expecting value)."),
    "not UTF-8": (b"[[0],\n\xff]", ", line 2: not UTF-8 (invalid start byte)."),
    "deep": (b"[" * 100_000, ": not a list of lists of experts (maximum recursion"),
    "digits": (b"[[" + b"1" * 5000 + b"]]", ": not a list of lists of experts (Exceeds the limit"),
}


@pytest.mark.core("strategy:file")
@pytest.mark.parametrize("name", ["edges.json", "path=a=1,b 2:3.json"])
def test_file_is_read_in_its_own_order_with_sorted_members(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf\r\n[ [3, 0],\n[1] ,[2,0,1]]\n")
    for text in (f"file:path={name}", f"file:path={tmp_path / name}"):
        assert static_hyperedges(4, text) == [(0, 3), (1,), (0, 1, 2)]
    assert make_coupler(static_hyperedge_strategy=f"file:path={name}")._num_hyperedges == 3
    (tmp_path / name).write_text(" [ ] ")
    assert static_hyperedges(0, f"file:path={name}") == static_hyperedges(4, f"file:path={name}") == []


@pytest.mark.core("strategy:file")
@pytest.mark.parametrize("case", BAD_FILES)
def test_file_refusals_name_the_file_and_the_line(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    data, message = BAD_FILES[case]
    (tmp_path / "edges.json").write_bytes(data)
    with pytest.raises(ValueError, match=r"^edges\.json") as caught:
        static_hyperedges(4, "file:edges.json")
    assert str(caught.value).startswith("edges.json" + message)


@pytest.mark.parametrize(
    ("path", "why"), [("no.json", "No such file"), (".", "Is a dir"), ("a\0", "null byte")]
)
def test_file_that_cannot_be_read_is_refused(path, why):
    with pytest.raises(ValueError, match=f"the file of hyperedges cannot be read .*{why}"):
        static_hyperedges(4, f"file:{path}")


def test_a_file_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "edges.json").write_text("[[0, 1]]")
    assert static_hyperedges(4, "file:~/edges.json") == [(0, 1)]
    assert strategy_identity("file:~/edges.json") == strategy_identity(f"file:{tmp_path}/edges.json")
    with pytest.raises(Refused, match="this home folder is not known"):
        static_hyperedges(4, "file:~nobody-has-this-name/edges.json")


@pytest.mark.core("strategy:file")
def test_identity_of_a_file_is_what_it_holds(tmp_path):
    def identity(name, text):
        (tmp_path / name).write_text(text)
        return strategy_identity(f"file:{tmp_path / name}")

    first = identity("a.json", "[[0, 1], [2, 99]]")
    assert re.fullmatch("file:sha256=[0-9a-f]{12}", first)
    assert identity("moved.json", "[[1,0],\n[99,2]]") == first
    others = [identity("a.json", text) for text in ("[[0, 1], [2, 9]]", "[[2, 99], [0, 1]]", "[]")]
    assert len({first, *others}) == 4
    with pytest.raises(ValueError, match=r"a\.json, line 1: member -1 is out of range; experts"):
        identity("a.json", "[[-1]]")
