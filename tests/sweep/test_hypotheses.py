"""hypotheses.toml: its schema, and that the sweep can answer it."""

from __future__ import annotations

import pytest

from bench.study.hypotheses import Hypothesis, check_against, load_hypotheses, read_hypotheses

GOOD = {
    "statement": "triplets are better", "by": 0.01,
    "better": {"coupler": "HGNN", "static-hyperedge-strategy": "all_triplets"}, "than": {"coupler": "GNN"},
}  # fmt: skip
CONFIGURATIONS = [
    {"coupler_type": "GNN"}, {"coupler_type": "HGNN"},
    {"coupler_type": "HGNN", "static_hyperedge_strategy": "all_triplets"},
]  # fmt: skip


def test_a_file_is_read_with_flags_under_any_of_their_names(tmp_path):
    path = tmp_path / "hypotheses.toml"
    path.write_text(
        '[[hypothesis]]\nstatement = "triplets are better"\nby = 0.01\n'
        'better = { coupler = "HGNN", static-hyperedge-strategy = "all_triplets" }\n'
        'than = { coupler_type = "GNN" }\n[[hypothesis]]\nstatement = "GNN is fast"\n'
        'better = {coupler = "GNN"}\nthan = {num_experts = 8}\nquantity = "tokens_per_second"\n'
    )
    first, second = load_hypotheses(path)
    assert first == Hypothesis(
        "triplets are better",
        {"coupler_type": "HGNN", "static_hyperedge_strategy": "all_triplets"},
        {"coupler_type": "GNN"},
        by=0.01,
    )
    assert (second.by, second.quantity, second.than) == (0.0, "tokens_per_second", {"num_experts": 8})


def test_what_is_wrong_is_named():
    for change, message in (
        ({"statment": "x"}, "hypothesis 1: unknown key 'statment'.*mean 'statement'"),
        ({"statement": " "}, "statement is ' '; it must be a sentence"),
        ({"by": 1}, "by is 1; it must be a share"),
        ({"by": -0.1}, "it must be a share"),
        ({"quantity": "perplexty"}, "mean 'perplexity'"),
        ({"better": {"copler": "GNN"}}, "better: unknown key 'copler'.*mean 'coupler'"),
        ({"than": {"num_experts": "four"}}, "than: num_experts is 'four'; it must be a whole number"),
        ({"than": "GNN"}, "than is 'GNN'; it must be a table of flags"),
    ):
        with pytest.raises(ValueError, match=message):
            read_hypotheses([{**GOOD, **change}])


def test_no_hypothesis_is_refused():
    for tables in (None, [], {}, "x", [3]):
        with pytest.raises(ValueError, match="there are none; each begins with"):
            read_hypotheses(tables)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "h.toml"
    with pytest.raises(ValueError, match=r"h\.toml cannot be read"):
        load_hypotheses(path)
    for text, message in (
        ("[[hypothesis]", "is not TOML"),
        ("[[hypothese]]\na=1", "unknown key 'hypothese'"),
        ("", "there are none"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=rf"h\.toml.*{message}"):
            load_hypotheses(path)


def test_the_sweep_must_be_able_to_answer():
    check_against(read_hypotheses([GOOD]), CONFIGURATIONS)
    nobody = read_hypotheses([{**GOOD, "than": {"coupler": "mean"}}])
    with pytest.raises(ValueError, match=r"than = .*mean.* selects no run of the sweep"):
        check_against(nobody, CONFIGURATIONS)
    both = read_hypotheses([{**GOOD, "than": {"coupler": "HGNN"}}])
    with pytest.raises(ValueError, match="a run is on both sides"):
        check_against(both, CONFIGURATIONS)
    default = read_hypotheses([{**GOOD, "than": {"num_experts": 4, "coupler": "GNN"}}])
    check_against(default, CONFIGURATIONS)  # what a preset or a default says counts too


def test_missing_keys_are_named():
    with pytest.raises(ValueError, match="better and than missing"):
        read_hypotheses([{"statement": "x"}])
