"""Adding a coupler touches one file; wrong names get one clear message (DESIGN, "Contracts")."""

import importlib
import sys
from importlib.metadata import EntryPoint

import pytest
import torch

from gnnmoe import discovery
from gnnmoe.couplers.mean import MeanCoupler
from gnnmoe.couplers.registry import (
    COUPLERS,
    build_coupler,
    coupler_class,
    coupler_names,
    coupler_option_defaults,
    register_coupler,
)
from tests.gnnmoe._support import make_model, normal, small_config, token_ids

THIRD_PARTY = '''
"""A coupler somebody wrote elsewhere."""
import torch
from gnnmoe import Coupler, GNNMoEModel, register_coupler
from gnnmoe.couplers.mean import MeanCoupler

{decorator}
class Scaled(Coupler):
    """s times the mean. .. math:: y = f(s m) Shapes: those of the mean. Source: this test."""

    def __init__(self, config, *, scale: float = 1.0, times: int = 2, on: bool = False, word: str = "a",
                 free: object = None):
        super().__init__(config)
        self.options = (scale, times, on, word, free)

    def forward(self, expert_outputs, layer_input=None):
        return self.combiner(self.options[0] * expert_outputs.mean(2))

    reference = forward


class OfTheMean(MeanCoupler):
    """Inherits from a registered one. .. math:: y = f(m) Shapes: those of the mean. Source: this test."""


number = 3
'''


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """What a test registers is forgotten after it."""
    coupler_names()
    monkeypatch.setattr(COUPLERS, "registered", dict(COUPLERS.registered))
    yield COUPLERS.registered
    COUPLERS.forget_discovery()


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """The name of a module on ``sys.path`` with an unregistered ``Scaled``."""
    (tmp_path / "third_party_coupler.py").write_text(THIRD_PARTY.format(decorator=""), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "third_party_coupler"
    sys.modules.pop("third_party_coupler", None)


def build(coupler_type: str, **options):
    return build_coupler(small_config(coupler_type=coupler_type, coupler_options=options))


def test_names_of_all_couplers_are_sorted():
    assert coupler_names() == sorted(coupler_names(), key=str.lower)
    assert {"GNN", "HGNN", "mean"} <= set(coupler_names())
    for name in coupler_names():
        assert coupler_class(name).name == name
        assert type(build_coupler(small_config(coupler_type=name))) is coupler_class(name)


def test_a_file_dropped_into_the_folder_is_found(tmp_path, monkeypatch):
    source = THIRD_PARTY.format(decorator='@register_coupler("dropped")')
    (tmp_path / "dropped_coupler.py").write_text(source, encoding="utf-8")
    (tmp_path / "_private.py").write_text("raise RuntimeError('not a coupler file')", encoding="utf-8")
    folders = importlib.import_module("gnnmoe.couplers").__path__
    monkeypatch.setattr("gnnmoe.couplers.__path__", [*folders, str(tmp_path)])
    COUPLERS.forget_discovery()
    try:
        assert "dropped" in coupler_names()
        assert build("dropped")(normal(1, 2, 4, 6).float()).shape == (1, 2, 6)
    finally:
        sys.modules.pop("gnnmoe.couplers.dropped_coupler", None)


def test_an_entry_point_is_found(third_party, monkeypatch):
    point = EntryPoint("scaled", f"{third_party}:Scaled", "gnnmoe.couplers")
    monkeypatch.setattr(discovery, "entry_points", lambda group: [point] if group == point.group else [])
    COUPLERS.forget_discovery()
    assert coupler_class("scaled").__name__ == "Scaled"
    assert coupler_class("scaled").name == "scaled"


def test_an_entry_point_that_breaks_the_contract_is_left_out_with_a_warning(third_party, monkeypatch):
    points = [EntryPoint(name, f"{third_party}:{name}", "gnnmoe.couplers") for name in ("number", "Scaled")]
    monkeypatch.setattr(discovery, "entry_points", lambda group: points)
    COUPLERS.forget_discovery()
    with pytest.warns(UserWarning, match="'number' of an installed package is left out: .* not a subclass"):
        names = coupler_names()
    assert "number" not in names
    assert {"Scaled", "mean", "HGNN"} <= set(names)


def test_package_module_class_is_imported_and_trains_in_a_model(third_party):
    path = f"{third_party}:Scaled"
    cls = coupler_class(path)
    assert (cls.__name__, cls.name) == ("Scaled", path)
    ids = token_ids(2, 8)
    one, half = (make_model(coupler_type=path, coupler_options={"scale": s}) for s in (1.0, 0.5))
    mean = make_model(coupler_type="mean")
    assert torch.equal(one(ids)["logits"], mean(ids)["logits"])
    assert not torch.equal(half(ids)["logits"], mean(ids)["logits"])


def test_a_class_that_inherits_from_a_registered_one_has_a_name_of_its_own(third_party):
    path = f"{third_party}:OfTheMean"
    assert coupler_class(path).name == path
    assert coupler_class("mean").name == "mean"


def test_unknown_name_lists_all_and_the_nearest():
    with pytest.raises(ValueError, match="unknown coupler 'hgn'") as caught:
        build("hgn")
    message = str(caught.value)
    assert "Did you mean 'HGNN'?" in message
    assert "module:Name or file.py:Name" in message
    assert all(name in message for name in coupler_names())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:Thing", "module 'no_such_module' cannot be imported"),
        ("gnnmoe.no_such:Thing", "module 'gnnmoe.no_such' cannot be imported"),
        ("third_party_coupler:Scald", "unknown coupler in third_party_coupler 'Scald'.*mean 'Scaled'"),
        ("third_party_coupler:GNNMoEModel", ":GNNMoEModel' breaks .* it is not a subclass of gnnmoe.Coupler"),
        ("third_party_coupler:number", ":number' breaks .* it is not a subclass of gnnmoe.Coupler"),
    ],
)
def test_wrong_paths_are_refused(third_party, path, message):
    with pytest.raises(ValueError, match=message):
        build(path)


def test_a_missing_dependency_of_a_coupler_is_not_hidden(tmp_path, monkeypatch):
    (tmp_path / "needs_something.py").write_text("import no_such_dependency", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="ModuleNotFoundError: No module named 'no_such_dependency'"):
        build("needs_something:Coupler")


def test_a_module_that_stops_the_program_is_refused(tmp_path, monkeypatch):
    (tmp_path / "stops_all.py").write_text("raise SystemExit('usage: …')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'stops_all' cannot be imported \(SystemExit: usage: …\)"):
        build("stops_all:Coupler")
    point = EntryPoint("stops", "stops_all:Coupler", "gnnmoe.couplers")
    monkeypatch.setattr(discovery, "entry_points", lambda group: [point])
    COUPLERS.forget_discovery()
    with pytest.warns(UserWarning, match="'stops' of an installed package is left out: usage: …"):
        assert "mean" in coupler_names()


def test_unknown_option_is_refused_with_the_nearest(third_party):
    with pytest.raises(ValueError, match=r"unknown option of coupler HGNN 'residul'.*mean 'residual'"):
        build("HGNN", residul=True)
    with pytest.raises(ValueError, match="unknown option of coupler mean 'k'; allowed: none"):
        build("mean", k=2)
    with pytest.raises(ValueError, match=r"allowed: free, on, scale, times, word.* mean 'scale'"):
        build(f"{third_party}:Scaled", scal=1.0)


def test_option_defaults_are_the_keyword_only_parameters(third_party):
    defaults = coupler_option_defaults(coupler_class(f"{third_party}:Scaled"))
    assert defaults == {"scale": 1.0, "times": 2, "on": False, "word": "a", "free": None}
    assert coupler_option_defaults(MeanCoupler) == {}


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("scale", "2.5", 2.5), ("scale", "1e-3", 1e-3), ("scale", 2.5, 2.5),
        ("times", "7", 7), ("times", 7, 7), ("word", "7", "7"), ("free", "7", "7"),
        ("on", "true", True), ("on", "Yes", True), ("on", "1", True), ("on", True, True),
        ("on", "false", False), ("on", "NO", False), ("on", "0", False),
    ],
)  # fmt: skip
def test_option_strings_are_read_as_the_type_of_the_default(third_party, option, value, expected):
    order = ("scale", "times", "on", "word", "free")
    options: tuple = build(f"{third_party}:Scaled", **{option: value}).options  # pyright: ignore
    found = options[order.index(option)]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("scale", "much", "option scale of coupler .* is 'much'; it must be of type float"),
        ("times", "2.5", "option times of coupler .* is '2.5'; it must be of type int"),
        ("on", "maybe", "option on of coupler .* is 'maybe'; it must be true or false"),
    ],
)
def test_option_strings_of_the_wrong_type_are_refused(third_party, option, value, message):
    with pytest.raises(ValueError, match=message):
        build(f"{third_party}:Scaled", **{option: value})


def test_a_duplicate_name_is_refused_and_a_reload_is_not(registered):
    class Other(MeanCoupler):
        __doc__ = MeanCoupler.__doc__

    with pytest.raises(
        ValueError, match=r"'mean' is registered already, by gnnmoe.couplers.mean.MeanCoupler"
    ):
        register_coupler("mean")(Other)
    assert registered["mean"] is MeanCoupler
    assert register_coupler("mean")(MeanCoupler) is MeanCoupler


def test_a_duplicate_name_is_refused_from_a_copied_file_too(registered):
    """``mean.py`` copied elsewhere, its class and its name unchanged."""
    copied = type(
        "MeanCoupler", (MeanCoupler,), {"__doc__": MeanCoupler.__doc__, "__module__": "somewhere.mean"}
    )
    assert copied.__qualname__ == MeanCoupler.__qualname__
    with pytest.raises(ValueError, match="'mean' is registered already"):
        register_coupler("mean")(copied)
    assert registered["mean"] is MeanCoupler
