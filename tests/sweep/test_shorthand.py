"""A sweep in one line of shell."""

from __future__ import annotations

import pytest

from bench.config import defaults, run_flags
from bench.sweep.specification import parse_shorthand, split_values


def flags(*words: str) -> list[dict]:
    return [request.flags for request in parse_shorthand(words).runs]


def refusal(*words: str, **options) -> str:
    with pytest.raises(ValueError, match=r"^--sweep: .*\.( Did you mean .*\?)?$") as refused:
        parse_shorthand(words, **options)
    return str(refused.value)


def test_the_product_in_the_order_given():
    sweep = parse_shorthand(["coupler=GNN,HGNN", "num_experts=2,4,8"], seeds=2, study="mine")
    assert (sweep.study, sweep.seeds, len(sweep.runs)) == ("mine", [0, 1], 12)
    assert [(run.seed, run.flags["coupler_type"], run.flags["num_experts"]) for run in sweep.runs] == [
        (seed, coupler, experts) for seed in (0, 1) for coupler in ("GNN", "HGNN") for experts in (2, 4, 8)
    ]
    assert [run.seed for run in parse_shorthand(["num_experts=2"], seeds=[7, 3]).runs] == [7, 3]


def test_values_are_separated():
    for text, values in (
        ("a,b,c", ["a", "b", "c"]),
        ('"random:k=3,m=4",ring', ["random:k=3,m=4", "ring"]),
        ('ring,random:"k=3,m=4",b', ["ring", "random:k=3,m=4", "b"]),
        ("random:k=3,m=4;ring", ["random:k=3,m=4", "ring"]),
        ('"a;b",c', ["a;b", "c"]),
        ('"a;b";c,d', ["a;b", "c,d"]),
        ('a;""', ["a", ""]),
    ):
        assert split_values(text) == values


@pytest.mark.parametrize(
    ("word", "field", "values"),
    [
        ("num-experts=2,4", "num_experts", [2, 4]),
        ("--num_experts=2,4", "num_experts", [2, 4]),
        ("dataset=wikitext,None", "dataset_name", ["wikitext", None]),
        ("learning_rate=1e-3,1", "learning_rate", [1e-3, 1.0]),
        ("hgnn_learnable_edge_weights=true,False", "hgnn_learnable_edge_weights", [True, False]),
        ("epochs=None,3", "epochs", [None, 3]),
        ("num_workers_dataloader=auto,2", "num_workers_dataloader", ["auto", 2]),
        ("adam_betas=0.9 0.95,0.8 0.9", "adam_betas", [[0.9, 0.95], [0.8, 0.9]]),
        ("coupler_option=k=2 backend=loop,k=3", "coupler_option", [["k=2", "backend=loop"], ["k=3"]]),
        ('coupler_option="",k=3', "coupler_option", [[], ["k=3"]]),
        ("preset=quick,baseline", "preset", ["quick", "baseline"]),
    ],
)
def test_a_value_is_read_as_its_flags_type(word, field, values):
    found = [row[field] for row in flags(word)]
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


def test_every_flag_is_read_back_from_what_it_says():
    for field, value in defaults().items():
        words = [str(item) for item in value] if isinstance(value, list) else str(value)
        assert run_flags()[field].read(words) == value


def test_a_value_has_one_plain_form():
    flags = run_flags()
    assert flags["epochs"].plain("None") is flags["run_name"].plain("None") is None
    assert flags["text_column"].plain("None") == "None"
    assert type(flags["learning_rate"].plain(1)) is float
    assert flags["adam_betas"].plain([0, 0.5]) == [0.0, 0.5]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "it names no flag; write coupler=GNN,HGNN num_experts=2,4,8"),
        (["coupler"], "'coupler' is not FLAG=VALUE,VALUE"),
        (["num_expert=2"], "unknown key 'num_expert'; python -m bench.run --help-all lists all flags."),
        (["num_experts=2,"], "a value is missing in '2,'"),
        (["num_experts=;;2"], "a value is missing in ';;2'"),
        (['coupler="GNN'], "a double quote is not closed"),
        (["num_experts=2,four"], "num_experts is 'four'; it must be a whole number"),
        (["num_experts=None"], "num_experts is 'None'; it must be a whole number"),
        (["adam_betas=0.9"], "adam_betas is [0.9]; it must be a list of a number in [0, 1) and a"),
        (["preset=basline"], "Did you mean 'baseline'?"),
        (["seed=1,2"], "seed cannot be set here: the seeds of all runs stand at the top"),
        (["num_experts=2", "num_experts=3"], "num_experts stands there twice"),
        (["coupler=GNN", "coupler_type=HGNN"], "are the same flag; keep one of them"),
    ],
)
def test_the_messages(words, said):
    assert said in refusal(*words)


def test_wrong_seeds_and_studies():
    assert "seeds is 0: a sweep of zero runs" in refusal("num_experts=2", seeds=0)
    assert "1 stands there twice" in refusal("num_experts=2", seeds=[1, 1])
    assert "study is 'a/b'" in refusal("num_experts=2", study="a/b")
