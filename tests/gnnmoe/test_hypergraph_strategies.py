"""The strategies of the spec: which experts share a hyperedge, as numbers, and their arguments as text."""

import math
import random
import re
from collections import Counter
from itertools import chain, combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gnnmoe import HGNNExpertCoupler
from gnnmoe.hypergraph.propagation import hyperedge_index, incidence, safe_reciprocal
from gnnmoe.hypergraph.strategies import STRATEGIES, register_strategy, static_hyperedges, strategy_identity
from tests.gnnmoe._support import make_coupler

generate = HGNNExpertCoupler.generate_static_hyperedges
FEWER = "ignore:random. m is"
COUNTS = {  # hyperedges for E = 0 to 8: M below, at and above E
    "all_pairs": [0, 0, 1, 3, 6, 10, 15, 21, 28],
    "all_triplets": [0, 0, 0, 1, 4, 10, 20, 35, 56],
    "pairs_and_triplets": [0, 0, 1, 4, 10, 20, 35, 56, 84],
    "all": [0, 0, 1, 1, 1, 1, 1, 1, 1],
    "k_subsets": [0, 0, 0, 1, 4, 10, 20, 35, 56],
    "k_subsets:2": [0, 0, 1, 3, 6, 10, 15, 21, 28],
    "k_subsets:k=5": [0, 0, 0, 0, 0, 1, 6, 21, 56],
    "ring": [0, 0, 1, 3, 4, 5, 6, 7, 8],
    "ring:k=3": [0, 0, 0, 1, 4, 5, 6, 7, 8],
    "random": [0, 0, 0, 1, 4, 5, 6, 7, 8],
    "random:k=2,m=5": [0, 0, 1, 3, 5, 5, 5, 5, 5],
    "random:k=4,m=9,seed=3": [0, 0, 0, 0, 1, 5, 9, 9, 9],
}
EXAMPLES = [pytest.param(text, marks=pytest.mark.core(f"strategy:{text.split(':')[0]}")) for text in COUNTS]
BAD_TEXTS = {
    "ring:n=3": "there is no argument 'n'. ring takes k (default 2); for example 'ring:k=3'.",
    "ring:k=x": "k is 'x'; it must be a whole number. ring takes k (default 2)",
    "ring:": "k has no value. ring takes",
    "ring:k=": "k has no value. ring takes",
    "ring:k=2,k=3": "k is given twice. ring takes",
    "k_subsets:None": "k is 'None'; it must be a whole number. k_subsets takes k (default 3)",
    "random:m=2.0": "m is '2.0'; it must be a whole number or None. random takes k (default 3), m (",
    "random:3,8": "there is no argument '8'. random takes k (default 3), m (default None), seed (default 0)",
    "random:k=3,": "there is no argument ''",
    "all:3": "there is no argument '3'. all takes no arguments; write 'all'.",
    "all_pairs:": "all_pairs takes no arguments",
    "file": "path has no value. file takes path (required); for example 'file:edges.json'.",
    "file:path=": "path has no value",
}  # fmt: skip


def test_strategies_put_the_node_row_above_the_hyperedge_row():
    index, _ = generate(3, "all_pairs")
    assert index.tolist() == [[0, 1, 0, 2, 1, 2], [0, 0, 1, 1, 2, 2]]
    index, _ = generate(4, "all_triplets")
    assert index.tolist() == [[0, 1, 2, 0, 1, 3, 0, 2, 3, 1, 2, 3], [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]]
    index, _ = generate(5, "all")
    assert index.tolist() == [list(range(5)), [0] * 5]


@pytest.mark.filterwarnings(FEWER)
@pytest.mark.parametrize("strategy", EXAMPLES)
def test_strategies_give_the_counted_distinct_hyperedges_of_distinct_experts(strategy):
    for E in range(9):
        members = static_hyperedges(E, strategy)
        assert len({frozenset(edge) for edge in members}) == len(members) == COUNTS[strategy][E], E
        for edge in members:
            assert list(edge) == sorted(set(edge))
            assert len(edge) >= 2
            assert set(edge) <= set(range(E))
        index, count = generate(E, strategy)
        assert (index.shape, index.dtype, count) == ((2, sum(map(len, members))), torch.int64, len(members))
        rebuilt: list[list[int]] = [[] for _ in members]
        for expert, edge in index.T.tolist():
            rebuilt[edge].append(expert)
        assert [tuple(edge) for edge in rebuilt] == members


@pytest.mark.parametrize(
    "strategy", ["all_pairs", "all_triplets", "pairs_and_triplets", "all", "k_subsets", "ring"]
)
def test_the_regular_strategies_have_every_expert_in_as_many_hyperedges(strategy):
    members = static_hyperedges(5, strategy)
    H = incidence(hyperedge_index(members), 5, len(members))
    assert len(set(H.sum(1).tolist())) == 1


@given(st.integers(0, 12), st.integers(2, 12))
def test_strategies_k_subsets_and_ring_of_any_size(E, k):
    assert static_hyperedges(E, f"k_subsets:k={k}") == list(combinations(range(E), k))
    members = static_hyperedges(E, f"ring:k={k}")
    assert all(len(set(edge)) == k and list(edge) == sorted(edge) for edge in members)
    assert len(set(members)) == len(members) == (E if k < E else int(k == E))
    if k < E:
        assert Counter(chain.from_iterable(members)) == dict.fromkeys(range(E), k)


def test_strategies_orders_and_names_for_one_thing():
    assert static_hyperedges(4, "ring:k=3") == [(0, 1, 2), (1, 2, 3), (0, 2, 3), (0, 1, 3)]
    assert static_hyperedges(3, "pairs_and_triplets") == [(0, 1), (0, 2), (1, 2), (0, 1, 2)]
    for E in range(9):
        pairs, triplets = static_hyperedges(E, "all_pairs"), static_hyperedges(E, "all_triplets")
        assert static_hyperedges(E, "k_subsets:k=2") == pairs
        assert static_hyperedges(E, "k_subsets") == triplets
        assert static_hyperedges(E, "pairs_and_triplets") == pairs + triplets
        assert E < 2 or static_hyperedges(E, f"ring:{E}") == static_hyperedges(E, "all")
        assert E < 2 or static_hyperedges(E, f"random:k=2,m={len(pairs)}") == pairs


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 9), st.integers(2, 6), st.integers(1, 130), st.integers(0, 2**70))
@pytest.mark.filterwarnings(FEWER)
def test_random_draws_m_distinct_sorted_hyperedges_from_its_arguments_alone(E, k, m, seed):
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    text = f"random:k={k},m={m},seed={seed}"
    members = static_hyperedges(E, text)
    assert len(members) == min(m, math.comb(E, k))
    assert members == sorted(set(members))
    assert set(members) <= set(combinations(range(E), k))
    after = random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()  # noqa: NPY002
    assert after == states
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(m)
        random.seed(m)  # hypothesis puts it back
        assert static_hyperedges(E, text) == members


@pytest.mark.parametrize("m", [4, 7])  # few of ten are drawn one by one, most of them from a list
def test_random_draws_every_subset_as_often(m):
    draws = [static_hyperedges(5, f"random:m={m},seed={seed}") for seed in range(2000)]
    counts, deviation = Counter(chain.from_iterable(draws)), math.sqrt(2000 * 0.1 * m * (1 - 0.1 * m))
    assert set(counts) == set(combinations(range(5), 3))
    assert all(abs(count - 200 * m) < 5 * deviation for count in counts.values())


def test_random_is_the_same_on_every_machine_also_where_there_are_many():
    assert static_hyperedges(6, "random:m=4,seed=1") == [(0, 2, 3), (0, 2, 4), (0, 4, 5), (1, 2, 5)]
    assert static_hyperedges(4, "random:k=2,m=4,seed=1") == [(0, 1), (0, 2), (1, 2), (1, 3)]
    assert len(static_hyperedges(64, "random:k=8,m=64")) == 64
    assert len(set(map(len, static_hyperedges(64, "random:k=32")))) == 1


def test_random_says_where_there_are_fewer_than_asked_for(recwarn):
    for strategy, E in (("random", 3), ("random:m=4", 4), ("random:m=9", 2)):
        static_hyperedges(E, strategy)
    assert not recwarn.list
    assert static_hyperedges(4, "random:m=5") == static_hyperedges(4, "all_triplets")
    said = "random: m is 5; hyperedges of 3 out of 4 experts: 4, all of them taken."
    assert [str(w.message) for w in recwarn.list] == [said]


@pytest.mark.parametrize(
    ("strategy", "message"),
    [(f"{name}:k={k}", f"k is {k}; it must be at least 2: a hyperedge of one expert has nobody to talk to")
     for name, k in (("k_subsets", 1), ("ring", 0), ("random", -1))]
    + [("random:m=0", "m is 0; it must be at least 1"), ("random:seed=-1", "seed is -1; it must not be neg")],
)  # fmt: skip
def test_arguments_out_of_range_are_refused(strategy, message):
    with pytest.raises(ValueError, match=message):
        static_hyperedges(0, strategy)
    with pytest.raises(ValueError, match="num_experts is -1; it must not be negative"):
        static_hyperedges(-1, strategy)


@pytest.mark.parametrize(
    ("strategy", "E", "number"),
    [
        ("all_pairs", 448, "100,128"), ("all_triplets", 86, "102,340"), ("pairs_and_triplets", 85, "102,340"),
        ("k_subsets:k=32", 64, "about 10^18"), ("k_subsets:k=20000", 40000, "about 10^12039"),
        ("ring", 100_001, "100,001"), ("random:m=100001", 200, "100,001"), ("random", 100_001, "100,001"),
    ],
)  # fmt: skip
def test_more_hyperedges_than_the_limit_are_refused_before_any_is_made(strategy, E, number, monkeypatch):
    monkeypatch.setattr("gnnmoe.hypergraph.strategies.combinations", lambda *_: pytest.fail("enumerated"))
    monkeypatch.setattr("gnnmoe.hypergraph.strategies._draw", lambda *_: pytest.fail("drawn"))
    with pytest.raises(ValueError, match=re.escape(f"has {number} hyperedges")) as caught:
        static_hyperedges(E, strategy)
    assert "at most 100,000 are allowed" in str(caught.value)


def test_as_many_hyperedges_as_the_limit_are_made(monkeypatch):
    assert len(static_hyperedges(447, "all_pairs")) == 99_681
    assert len(static_hyperedges(200, "random:m=100000")) == 100_000
    monkeypatch.setitem(STRATEGIES.registered, "doubled", lambda num_experts: [(0, 1)] * 100_001)
    with pytest.raises(ValueError, match="has 100,001 hyperedges"):
        static_hyperedges(2, "doubled")


@pytest.mark.parametrize("strategy", BAD_TEXTS)
def test_arguments_that_cannot_be_read_are_refused_with_an_example(strategy):
    for function in (lambda text: static_hyperedges(4, text), strategy_identity):
        with pytest.raises(ValueError, match=r"^strategy ") as caught:
            function(strategy)
        assert f"strategy {strategy!r}: " in str(caught.value)
        assert BAD_TEXTS[strategy] in str(caught.value)


def test_identity_is_one_for_every_spelling_and_holds_every_argument():
    same = {
        "all_pairs": ["all_pairs"],
        "ring:k=2": ["ring", "ring:2", "ring:k=2", "ring:k= 02"],
        "k_subsets:k=4": ["k_subsets:4", "k_subsets:k=4"],
        "random:k=3,m=None,seed=0": ["random", "random:3", "random:seed=0,m=None", "random:3, seed=0"],
        "random:k=4,m=8,seed=1": ["random:seed=1,k=4,m=8", "random:4,m=8,seed=1"],
    }
    for identity, spellings in same.items():
        assert {strategy_identity(text) for text in [*spellings, identity]} == {identity}


def test_strategies_unknown_name_lists_all_and_the_nearest():
    with pytest.raises(ValueError, match=r"unknown static_hyperedge_strategy 'all_pair'") as caught:
        generate(4, "all_pair")
    assert "Did you mean 'all_pairs'?" in str(caught.value)
    for name in STRATEGIES:
        assert name in str(caught.value)
    with pytest.raises(ValueError, match="allowed: all, all_pairs, all_triplets") as caught:
        make_coupler(static_hyperedge_strategy="zzz")
    assert "Did you mean" not in str(caught.value)


def test_strategies_are_a_registry(monkeypatch):
    monkeypatch.setattr(STRATEGIES, "registered", dict(STRATEGIES.registered))

    @register_strategy("ends")
    def ends(num_experts):
        return [(0, num_experts - 1)]

    assert generate(4, "ends")[0].tolist() == [[0, 3], [0, 0]]
    assert make_coupler(static_hyperedge_strategy="ends")._num_hyperedges == 1


def test_incidence_marks_members_and_nothing_else():
    H = incidence(torch.tensor([[0, 2, 2], [0, 0, 1]]), 4, 3)
    assert H.dtype == torch.float64
    assert H.tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert incidence(torch.empty(2, 0, dtype=torch.int64), 0, 0).shape == (0, 0)


def test_safe_reciprocal_of_zero_is_zero_with_gradient_zero():
    values = torch.tensor([2.0, 0.0, -4.0], requires_grad=True)
    result = safe_reciprocal(values)
    result.sum().backward()
    assert result.tolist() == [0.5, 0.0, -0.25]
    assert values.grad is not None
    assert values.grad.tolist() == [-0.25, 0.0, -0.0625]
