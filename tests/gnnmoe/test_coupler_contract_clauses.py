"""Each clause of the contract is refused by name, at every door through which a class comes in."""

import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch

from gnnmoe import discovery
from gnnmoe.couplers.base import check_contract
from gnnmoe.couplers.registry import (
    COUPLERS,
    coupler_class,
    coupler_names,
    coupler_option_defaults,
    register_coupler,
)
from tests.gnnmoe._support import small_config

HONEST = """
from gnnmoe import Coupler

class Mixer(Coupler):
    def __init__(self, config, *, k=2):
        super().__init__(config)
        self.k = k

    def forward(self, expert_outputs, layer_input=None):
        return self.combiner(expert_outputs.mean(2))

    def reference(self, expert_outputs, layer_input=None):
        return self.combiner(expert_outputs.sum(2) / expert_outputs.shape[2])
"""
INIT = "self, config, *, k=2"
FORWARD = "def forward(self, expert_outputs, layer_input=None):"
REFERENCE = "def reference(self, expert_outputs, layer_input=None):"
WANTED = r"it must take \(expert_outputs, layer_input=None\) after self"
EXTRA = REFERENCE + "\n        pass\n\n    def "
CLASSMETHOD = REFERENCE + "\n        pass\n\n    @classmethod\n    def "
FIELDS_ARE = r"it must be None, or a tuple of some of gnn_layers, hgnn_conv_type, static_hyperedge_strategy, "
CLAUSES = {
    "subclass": ("Mixer(Coupler)", "Mixer", "it is not a subclass of gnnmoe.Coupler"),
    "forward": (FORWARD, "def mix(self):", "it does not implement forward;"),
    "**kwargs": (INIT, "self, config, **kwargs", r"takes \*\*kwargs, which would swallow a misspelt option"),
    "**kwargs and options": (INIT, INIT + ", **rest", r"takes \*\*rest, .*name each option as a keyword"),
    "*args": (INIT, "self, config, *args, k=2", r"__init__ takes \*args, which no option can reach"),
    "nothing but *args": (INIT, "*args", r"__init__ takes \*args, which no option can reach"),
    "no config": (INIT, "self, *, k=2", "first parameter of __init__ after self is missing"),
    "config by keyword": (INIT, "self, *, config, k=2", "first parameter of __init__ after self is missing"),
    "config by another name": (INIT, "self, cfg, *, k=2", "after self is 'cfg'; it must be config"),
    "positional option": (INIT, "self, config, k=2", "takes 'k' by position; make it keyword-only"),
    "option without default": (INIT, "self, config, *, k", "option 'k' of __init__ has no default"),
    "device": (INIT, INIT + ", device=None", r"an option 'device'; remove it: .* by .to\(device\)"),
    "device by position": (INIT, "self, config, device, *, k=2", "an option 'device'; remove it"),
    "dtype": (INIT, INIT + ", dtype=None", "an option 'dtype'; remove it"),
    "default of a tuple": (INIT, INIT + ", sizes=(1, 2)", "option 'sizes' of __init__ is of type tuple; opt"),
    "default of a list": (INIT, INIT + ", sizes=[]", "type list; .* make it a bool, int, float, str or None"),
    "forward's name": (
        FORWARD, "def forward(self, x, layer_input=None):",
        rf"forward takes \(x, layer_input=None\); {WANTED}, by these names, and nothing else",
    ),
    "forward's layer input": (FORWARD, "def forward(self, expert_outputs):", f"forward takes .*; {WANTED}"),
    "forward's default": (
        FORWARD, "def forward(self, expert_outputs, layer_input):",
        rf"forward takes \(expert_outputs, layer_input\); {WANTED}",
    ),
    "forward's order": (
        FORWARD, "def forward(self, layer_input=None, expert_outputs=None):", f"forward takes .*; {WANTED}",
    ),
    "forward's extra": (
        FORWARD, "def forward(self, expert_outputs, layer_input=None, mask=None):",
        rf"forward takes .* mask=None\); {WANTED}",
    ),
    "forward's **kwargs": (
        FORWARD, "def forward(self, expert_outputs, layer_input=None, **kwargs):",
        rf"forward takes .*\*\*kwargs\); {WANTED}",
    ),
    "static forward": (
        FORWARD, "@staticmethod\n    " + FORWARD, rf"forward takes \(self, expert_outputs, .*\); {WANTED}",
    ),
    "no method": (FORWARD, "forward = 3\n\n    def mix(self):", "forward is no method"),
    "reference's name": (
        REFERENCE, "def reference(self, x, layer_input=None):", rf"reference takes .*; {WANTED}",
    ),
    "auxiliary losses": (
        REFERENCE, EXTRA + "auxiliary_losses(self, expert_outputs):", f"auxiliary_losses takes .*; {WANTED}",
    ),
    "communication": (
        REFERENCE, EXTRA + "communication(self, expert_outputs, layer_input=None):",
        r"communication takes .*; it must take \(expert_outputs=None, layer_input=None\) after self",
    ),
    "flops": (
        REFERENCE, EXTRA + "flops(self, batch, length):",
        r"flops takes \(batch, length\); it must take \(tokens\) after self",
    ),
    "fields by text": (
        "def __init__(", "config_fields = 'gnn_layers'\n\n    def __init__(",
        f"config_fields is 'gnn_layers'; {FIELDS_ARE}",
    ),
    "fields by list": (
        "def __init__(", "config_fields = ['gnn_layers']\n\n    def __init__(",
        rf"config_fields is \['gnn_layers'\]; {FIELDS_ARE}",
    ),
    "unknown field": (
        "def __init__(", "config_fields = ('gnn_layers', 'gnn_layer')\n\n    def __init__(",
        rf"config_fields is \('gnn_layers', 'gnn_layer'\); {FIELDS_ARE}",
    ),
    "fields of an instance": (
        REFERENCE, EXTRA + "fields_read(self, options):", "fields_read is no classmethod; put @classmethod",
    ),
    "fields_read": (
        REFERENCE, CLASSMETHOD + "fields_read(cls):",
        r"fields_read takes \(\); it must take \(options\) after self",
    ),
    "canonical_options": (
        REFERENCE, CLASSMETHOD + "canonical_options(cls, options):",
        r"canonical_options takes .*; it must take \(config, options\) after self",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _registry_as_it_was(monkeypatch):
    coupler_names()
    monkeypatch.setattr(COUPLERS, "registered", dict(COUPLERS.registered))
    yield
    COUPLERS.forget_discovery()


def mixer(source: str = HONEST) -> Any:
    space: dict[str, Any] = {"__name__": "mine"}
    exec(source, space)
    return space["Mixer"]


def changed(honest: str, broken: str) -> str:
    assert HONEST.count(honest) == 1
    return HONEST.replace(honest, broken)


def test_an_honest_class_comes_in():
    check_contract(mixer())
    cls = register_coupler("mixer")(mixer())
    assert coupler_class("mixer") is cls
    assert coupler_option_defaults(cls) == {"k": 2}


def test_a_class_with_forward_alone_comes_in():
    start, end = HONEST.index("    def __init__"), HONEST.index("    def forward")
    alone = mixer(HONEST[:start] + HONEST[end : HONEST.index("    def reference")])
    check_contract(alone)
    assert set(vars(alone)) & {"reference", "flops", "config_fields"} == set()


def test_what_describes_another_forward_is_not_inherited():
    """``reference`` and ``flops`` of a base class are about its own ``forward``."""
    space: dict[str, Any] = {}
    exec(
        "from gnnmoe.couplers.mean import MeanCoupler\n"
        "class Same(MeanCoupler): pass\n"
        "class Other(MeanCoupler):\n"
        "    def forward(self, expert_outputs, layer_input=None): return expert_outputs[:, :, 0]\n",
        space,
    )
    same, other = (space[name](small_config()) for name in ("Same", "Other"))
    x = torch.ones(1, 2, 4, 6)
    assert (same.flops(1), other.flops(1)) == (2 * 6 * 6, None)
    assert torch.equal(same.reference(x), same(x))
    assert other.reference(x) is None


def test_an_option_may_have_each_type_that_a_command_line_can_say():
    for default in ("True", "3", "0.5", "'text'", "None"):
        check_contract(mixer(changed(INIT, f"self, config, *, k={default}")))


@pytest.mark.parametrize(("honest", "broken", "message"), CLAUSES.values(), ids=CLAUSES)
def test_each_clause_is_named_with_the_class(honest, broken, message):
    cls = mixer(changed(honest, broken))
    with pytest.raises(ValueError, match=message) as caught:
        check_contract(cls)
    assert str(caught.value).startswith("coupler 'mine:Mixer' breaks the contract: ")
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize("clause", ["subclass", "forward", "**kwargs", "flops"])
def test_a_clause_holds_at_every_door(clause, tmp_path, monkeypatch):
    *change, message = CLAUSES[clause]
    source = changed(*change)
    with pytest.raises(ValueError, match=f"coupler 'mixer' breaks the contract: .*{message}"):
        register_coupler("mixer")(mixer(source))
    file = tmp_path / "broken_mixer.py"
    file.write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "broken_mixer", raising=False)
    for path in ("broken_mixer:Mixer", f"{file}:Mixer"):
        with pytest.raises(ValueError, match=f"coupler '{path}' breaks the contract: .*{message}"):
            coupler_class(path)
    point = EntryPoint("mixer", "broken_mixer:Mixer", "gnnmoe.couplers")
    monkeypatch.setattr(discovery, "entry_points", lambda group: [point])
    COUPLERS.forget_discovery()
    with pytest.warns(UserWarning, match=f"'mixer' of an installed package is left out: .*{message}"):
        assert "mixer" not in coupler_names()


@pytest.mark.parametrize("thing", [None, "mean"])
def test_what_is_no_class_is_refused_by_its_value(thing):
    with pytest.raises(ValueError, match=r"breaks the contract: it is not a subclass") as caught:
        check_contract(thing)
    assert repr(repr(thing)) in str(caught.value)


def test_the_base_class_itself_is_no_coupler():
    with pytest.raises(ValueError, match="does not implement forward;"):
        coupler_class("gnnmoe:Coupler")


def test_config_fields_may_be_nothing_or_names_of_fields():
    for value in ("None", "()", "('gnn_layers', 'hgnn_conv_type')"):
        check_contract(mixer(changed("def __init__(", f"config_fields = {value}\n\n    def __init__(")))
