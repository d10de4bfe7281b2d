"""``path/to/file.py:Class``: loaded from anywhere, known by its content, refused in one message."""

import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch

from gnnmoe import GNNMoEConfig, GNNMoEModel
from gnnmoe.config import Refused
from gnnmoe.couplers.base import Coupler
from gnnmoe.couplers.registry import (
    COUPLERS,
    build_coupler,
    coupler_class,
    coupler_identity,
    coupler_names,
    resolved_options,
)
from gnnmoe.hypergraph.strategies import strategy_function
from gnnmoe.layers.base import LAYERS

EXAMPLE = Path(__file__).parents[2] / "examples" / "twenty_line_coupler.py"
MINE = '''
from dataclasses import dataclass
from gnnmoe import Coupler

print("loaded")

@dataclass
class Settings:
    scale: float

class Scaled(Coupler):
    """s times the mean.

    .. math:: y = f(s m)

    Shapes: those of the mean. Source: this test.
    """

    def __init__(self, config, *, scale: float = 1.5):
        super().__init__(config)
        self.settings = Settings(scale)

    def forward(self, expert_outputs, layer_input=None):
        return self.combiner(self.settings.scale * expert_outputs.mean(2))

    reference = forward

number = 3
'''


def config(coupler_type: str, **fields) -> GNNMoEConfig:
    small = {"embed_dim": 6, "max_seq_length": 8, "vocab_size": 50, "num_layers": 1}
    return GNNMoEConfig(coupler_type=coupler_type, **{**small, **fields})


def identity(coupler_type: str, **fields) -> dict:
    return coupler_identity(config(coupler_type, **fields))


@pytest.fixture
def mine(tmp_path) -> Path:
    path = tmp_path / "my-own.coupler.py"
    path.write_text(MINE, encoding="utf-8")
    return path


def test_a_class_is_loaded_from_a_file_and_trains_in_a_model(mine):
    cls = coupler_class(f"{mine}:Scaled")
    assert (cls.__name__, cls.name) == ("Scaled", "my-own.coupler.py:Scaled")
    assert cls.name not in coupler_names()
    model = GNNMoEModel(config(f"{mine}:Scaled", coupler_options={"scale": "0.5"}), seed=0)
    coupler: Coupler = model.layers[0].coupler  # pyright: ignore
    assert type(coupler) is cls
    assert coupler.settings.scale == 0.5  # pyright: ignore
    ids = torch.zeros(1, 8, dtype=torch.int64)
    model(ids, labels=ids)["loss"].backward()
    assert coupler.combiner[0].weight.grad.abs().max() > 0  # pyright: ignore


def test_a_file_is_loaded_once_however_its_path_is_written(mine, monkeypatch, capsys):
    monkeypatch.chdir(mine.parent)
    (mine.parent / "folder").mkdir()
    (mine.parent / "link.py").symlink_to(mine)
    texts = (str(mine), mine.name, f"./{mine.name}", f"folder/../{mine.name}", "link.py")
    classes = {coupler_class(f"{text}:Scaled") for text in texts}
    assert len(classes) == 1
    assert capsys.readouterr().out == "loaded\n"


def test_a_home_folder_is_understood(mine, monkeypatch):
    monkeypatch.setenv("HOME", str(mine.parent))
    assert coupler_class(f"~/{mine.name}:Scaled") is coupler_class(f"{mine}:Scaled")


@pytest.mark.parametrize("load", [coupler_class, LAYERS.find, strategy_function])
def test_a_home_folder_that_is_not_known_is_refused(load):
    with pytest.raises(Refused, match=r"'~no-such-user/f.py': this home folder is not known; give the"):
        load("~no-such-user/f.py:C")


def test_nothing_is_left_beside_the_file(mine, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    coupler_class(f"{mine}:Scaled")
    assert [path.name for path in mine.parent.iterdir()] == [mine.name]


def test_classes_of_a_file_pickle(mine):
    coupler = build_coupler(config(f"{mine}:Scaled"))
    again = pickle.loads(pickle.dumps(coupler))
    assert type(again) is type(coupler)
    x = torch.randn(1, 2, 4, 6)
    assert torch.equal(again(x), coupler(x))


def test_a_file_is_compiled_as_it_stands_without_the_loader_s_future_imports(mine):
    coupler = build_coupler(config(f"{mine}:Scaled"))
    assert type(coupler.settings).__annotations__ == {"scale": float}


def test_two_files_of_one_name_do_not_meet(mine, tmp_path):
    other = tmp_path / "other" / mine.name
    other.parent.mkdir()
    other.write_text(MINE.replace("1.5", "2.5"), encoding="utf-8")
    found = [resolved_options(config(f"{path}:Scaled"))["scale"] for path in (mine, other, mine)]
    assert found == [1.5, 2.5, 1.5]


def test_an_edited_file_is_loaded_again_even_within_the_same_second(mine, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    seen = []
    for scale in ("1.5", "2.5", "3.5"):  # same size, and most likely the same time stamp
        mine.write_text(MINE.replace("1.5", scale), encoding="utf-8")
        seen.append(resolved_options(config(f"{mine}:Scaled"))["scale"])
    assert seen == [1.5, 2.5, 3.5]


def test_identity_names_the_class_of_a_file_and_not_its_content():
    assert identity(f"{EXAMPLE}:NormCoupler")["coupler_type"] == "file:NormCoupler"
    assert identity("mean")["coupler_type"] == "mean"
    by_module = "examples.twenty_line_coupler:NormCoupler"
    assert identity(by_module)["coupler_type"] == by_module


def test_a_moved_file_is_the_same_run(mine, tmp_path, monkeypatch):
    before = identity(f"{mine}:Scaled", coupler_options={"scale": 2})
    moved = tmp_path / "deeper" / "renamed.py"
    moved.parent.mkdir()
    shutil.move(mine, moved)
    assert identity(f"{moved}:Scaled", coupler_options={"scale": "2.0"}) == before
    monkeypatch.chdir(moved.parent)
    assert identity("renamed.py:Scaled", coupler_options={"renamed.py:Scaled.scale": 2}) == before


def test_an_edited_file_is_the_same_run_and_an_option_of_another_default_another(mine):
    before = identity(f"{mine}:Scaled")
    mine.write_text(MINE.replace("expert_outputs.mean(2)", "expert_outputs.sum(2)"), encoding="utf-8")
    assert identity(f"{mine}:Scaled") == before  # it is stale: see tests/bench/test_stale.py
    mine.write_text(MINE.replace("1.5", "2.5"), encoding="utf-8")
    edited = identity(f"{mine}:Scaled")
    assert {key for key in before if before[key] != edited[key]} == {"coupler_options"}


def test_an_option_may_be_prefixed_by_the_path_or_the_file_name(mine):
    for prefix in (f"{mine}:Scaled", f"{mine.name}:Scaled"):
        options = {f"{prefix}.scale": "4", "HGNN.residual": "false"}
        assert resolved_options(config(f"{mine}:Scaled", coupler_options=options)) == {"scale": 4.0}
    options = {f"{mine}:Scaled.scale": "4"}
    assert resolved_options(config("mean", coupler_options=options)) == {}


@pytest.mark.parametrize(
    ("source", "class_name", "message"),
    [
        (None, "Scaled", r"there is no file .*wrong\.py; give its path from the current folder"),
        ("class Scaled(:", "Scaled", r"wrong\.py cannot be loaded \(SyntaxError: .*line 1\)"),
        ("x = 1\0", "Scaled", r"wrong\.py cannot be loaded \(.*null bytes"),
        ("import no_such", "Scaled", r"cannot be loaded \(ModuleNotFoundError: No module named 'no_such'"),
        ("1 / 0", "Scaled", r"cannot be loaded \(ZeroDivisionError: division by zero\)"),
        ("import sys; sys.exit(3)", "Scaled", r"cannot be loaded \(SystemExit: 3\)"),
        (
            MINE,
            "Scald",
            r"unknown coupler in wrong\.py 'Scald'; allowed: Scaled\. Did you mean 'Scaled'",
        ),
        (MINE, "number", r"breaks the contract: it is not a subclass of gnnmoe\.Coupler"),
        (MINE, "Settings", r"breaks the contract: it is not a subclass of gnnmoe\.Coupler"),
        (MINE, "", r"is not of the form package\.module:Name or file\.py:Name"),
    ],
)
def test_a_wrong_file_or_class_is_one_message(tmp_path, source, class_name, message):
    path = tmp_path / "wrong.py"
    if source is not None:
        path.write_text(source, encoding="utf-8")
    modules = set(sys.modules)
    for _ in range(2):  # a failed load leaves nothing behind
        with pytest.raises(ValueError, match=message) as caught:
            coupler_class(f"{path}:{class_name}")
        assert "\n" not in str(caught.value)
    if source != MINE:
        assert not [name for name in set(sys.modules) - modules if "wrong" in name]


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(ValueError, match=r"folder\.py cannot be read: Is a directory\."):
        coupler_class(f"{tmp_path}/folder.py:Scaled")


def test_an_edit_that_breaks_the_file_keeps_what_was_loaded_importable(mine):
    cls = coupler_class(f"{mine}:Scaled")
    mine.write_text("class Scaled(:", encoding="utf-8")
    with pytest.raises(ValueError, match="SyntaxError"):
        coupler_class(f"{mine}:Scaled")
    assert sys.modules[cls.__module__].Scaled is cls


def test_a_file_without_a_class_is_told_how():
    with pytest.raises(ValueError, match=r"unknown coupler 'mine\.py'; .* or file\.py:Name\."):
        coupler_class("mine.py")


def test_a_file_may_register_its_class_and_be_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(COUPLERS, "registered", dict(COUPLERS.registered))
    path = tmp_path / "registers.py"
    decorated = MINE.replace("import Coupler", "import Coupler, register_coupler")
    decorated = decorated.replace("class Scaled", '@register_coupler("scaled")\nclass Scaled')
    for text in (decorated, decorated + "# edited\n"):
        path.write_text(text, encoding="utf-8")
        assert coupler_class(f"{path}:Scaled") is coupler_class("scaled")
    path.write_text(decorated.replace('"scaled"', '"mean"'), encoding="utf-8")
    with pytest.raises(ValueError, match=r"cannot be loaded .* coupler 'mean' is registered already"):
        coupler_class(f"{path}:Scaled")
