"""One model, one identity; two models, two: whatever class a coupler inherits from, however it is said."""

import pytest

from gnnmoe.couplers.dense import DenseCoupler
from gnnmoe.couplers.mean import MeanCoupler
from gnnmoe.couplers.registry import COUPLERS, coupler_identity, coupler_names, register_coupler
from gnnmoe.couplers.topk import TopKCoupler
from tests.gnnmoe._support import small_config

DOCUMENTED = ".. math:: y = f(m) Shapes: those of the mean. Source: this test."


class SubMean(MeanCoupler):
    __doc__ = f"Reads gnn_layers, and does not say so. {DOCUMENTED}"


class SaysLayers(MeanCoupler):
    __doc__ = f"Reads gnn_layers, and says so. {DOCUMENTED}"
    config_fields = ("gnn_layers",)


class SaysByOption(MeanCoupler):
    __doc__ = f"Says so by an option. {DOCUMENTED}"

    def __init__(self, config, *, deep: bool = False):
        super().__init__(config)

    @classmethod
    def fields_read(cls, options):
        return ("gnn_layers",) if options["deep"] else ()


class SaysWrong(MeanCoupler):
    __doc__ = f"Says what there is not. {DOCUMENTED}"

    @classmethod
    def fields_read(cls, options):
        return ("num_layers",)


class SaysWrongOptions(MeanCoupler):
    __doc__ = f"Makes options up. {DOCUMENTED}"
    config_fields = ()

    @classmethod
    def canonical_options(cls, config, options):
        return {"made": "up"}


class SubDense(DenseCoupler):
    __doc__ = f"Reads what it likes. {DOCUMENTED}"


class SaysDense(DenseCoupler):
    __doc__ = f"Inherits fields_read, but says itself what it reads. {DOCUMENTED}"
    config_fields = ("gnn_layers",)


class SubTopK(TopKCoupler):
    __doc__ = f"Makes something else of k. {DOCUMENTED}"


@pytest.fixture
def registered(monkeypatch):
    coupler_names()
    monkeypatch.setattr(COUPLERS, "registered", dict(COUPLERS.registered))
    yield
    COUPLERS.forget_discovery()


def identity(coupler, options=None, **fields) -> dict:
    name = coupler if isinstance(coupler, str) else f"{coupler.__module__}:{coupler.__qualname__}"
    return coupler_identity(small_config(coupler_type=name, coupler_options=options or {}, **fields))


def counting(coupler, options=None) -> set[str]:
    """The fields of which another value makes another identity."""
    others = {"gnn_layers": 3, "hgnn_conv_type": "HNHN", "static_hyperedge_strategy": "all",
              "hgnn_learnable_edge_weights": False}  # fmt: skip
    own = identity(coupler, options)
    return {name for name, value in others.items() if identity(coupler, options, **{name: value}) != own}


EVERY = {"gnn_layers", "hgnn_conv_type", "static_hyperedge_strategy", "hgnn_learnable_edge_weights"}


@pytest.mark.parametrize(
    ("coupler", "options", "fields"),
    [
        (MeanCoupler, {}, set()),
        (SubMean, {}, EVERY),
        (SaysLayers, {}, {"gnn_layers"}),
        (SaysByOption, {}, set()),
        (SaysByOption, {"deep": "yes"}, {"gnn_layers"}),
        (DenseCoupler, {}, set()),
        (DenseCoupler, {"like": "GNN"}, {"gnn_layers"}),
        (DenseCoupler, {"like": "HGNN"}, EVERY),
        (DenseCoupler, {"like": "HGNN", "match": "none"}, set()),
        (SubDense, {}, EVERY),
        (SaysDense, {}, {"gnn_layers"}),
    ],
)
def test_a_field_counts_unless_the_class_itself_says_that_it_does_not_read_it(coupler, options, fields):
    assert counting(coupler, options) == fields


def test_dense_takes_no_inherited_word_for_its_twin(registered):
    register_coupler("sub_mean")(SubMean)
    register_coupler("says_layers")(SaysLayers)
    assert counting(DenseCoupler, {"like": "sub_mean"}) == EVERY
    assert counting(DenseCoupler, {"like": "says_layers"}) == {"gnn_layers"}


def test_a_class_that_says_nonsense_is_refused():
    with pytest.raises(
        ValueError, match=r"fields_read of coupler .*SaysWrong gives \('num_layers',\); it must"
    ):
        identity(SaysWrong)
    with pytest.raises(
        ValueError, match=r"canonical_options of coupler .*SaysWrongOptions gives \{'made': 'up'"
    ):
        identity(SaysWrongOptions)


SAME = [
    ("topk", {"k": 4}, {"k": 9}, {}),
    ("topk", {"k": 2}, {}, {}),
    ("dense", {"match": "none"}, {"match": "none", "like": "HGNN"}, {}),
    ("HGNN", {}, {"edge_weights": "raw"}, {"hgnn_learnable_edge_weights": False}),
]
DIFFERENT = [
    ("topk", {"k": 3}, {"k": 9}, {}),
    ("topk", {"k": 4}, {"k": 9}, {"num_experts": 5}),
    ("dense", {"match": "params"}, {"match": "params", "like": "HGNN"}, {}),
    ("HGNN", {}, {"edge_weights": "raw"}, {}),
    ("HGNN", {}, {"residual": False}, {"hgnn_learnable_edge_weights": False}),
    (SubTopK, {"k": 4}, {"k": 9}, {}),
]


@pytest.mark.parametrize(("coupler", "one", "other", "fields"), SAME)
def test_options_that_give_one_model_give_one_identity(coupler, one, other, fields):
    assert identity(coupler, one, **fields) == identity(coupler, other, **fields)


@pytest.mark.parametrize(("coupler", "one", "other", "fields"), DIFFERENT)
def test_options_that_give_two_models_give_two(coupler, one, other, fields):
    assert identity(coupler, one, **fields) != identity(coupler, other, **fields)


@pytest.mark.parametrize("coupler", coupler_names())
def test_the_start_counts_only_where_it_is_not_the_projects(coupler):
    """Records from before there was a choice keep their run_id."""
    plain, original = identity(coupler), identity(coupler, initialization="original")
    assert "initialization" not in plain
    assert identity(coupler, initialization="project") == plain
    assert original == {**plain, "initialization": "original"}


@pytest.mark.parametrize(
    ("one", "other", "num_experts", "same"),
    [
        ("random", "random:m=5", 5, True),
        ("random", "random:m=4", 5, False),
        ("random:k=3,m=None,seed=0", "random:m=6", 6, True),
        ("random:m=4", "random:m=99", 4, True),  # four are all there are
        ("random:m=1", "random", 3, True),
        ("random", "random:seed=1", 5, False),
    ],
)
def test_random_counts_by_how_many_it_draws(one, other, num_experts, same):
    found = [
        identity("HGNN", static_hyperedge_strategy=text, num_experts=num_experts) for text in (one, other)
    ]
    assert (found[0] == found[1]) == same


def test_a_path_to_a_registered_class_is_its_name(registered):
    paths = ("gnnmoe.couplers.mean:MeanCoupler", "tests.gnnmoe.test_coupler_identity:MeanCoupler")
    assert [identity(path) for path in paths] == [identity("mean")] * 2
    assert identity("gnnmoe:HGNNExpertCoupler", {"backend": "loop"}) == identity("HGNN", {"backend": "loop"})
    assert identity(SubMean)["coupler_type"] == f"{SubMean.__module__}:SubMean"


def test_a_name_that_another_process_would_not_find_does_not_count(registered):
    """A module that registers its class only when it is imported by path."""
    register_coupler("says_layers")(SaysLayers)
    path = f"{SaysLayers.__module__}:SaysLayers"
    assert identity(path)["coupler_type"] == path
