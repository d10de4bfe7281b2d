"""The five facts of docs/couplers.md: each is shown by one command, with the numbers the page names."""

import re

import pytest
import torch

from examples import five_facts


def shown(number: int, capsys) -> str:
    assert five_facts.main([str(number)]) == 0
    return capsys.readouterr().out


def test_fact_1_merges_where_there_are_more_hyperedges_than_experts(capsys):
    lines = shown(1, capsys).splitlines()[1:]
    leaks = {tuple(map(int, re.findall(r"\d+", line)[:2])): "sees" in line and "no token" not in line
             for line in lines}  # fmt: skip
    assert leaks == {(3, 3): False, (4, 6): True, (4, 4): False, (5, 10): True}


def test_fact_2_doubled_weights_halve_pygs_output_only(capsys):
    numbers = [float(n) for n in re.findall(r"\d+\.\d+", shown(2, capsys))]
    pyg, documented, pyg_twice, documented_twice = numbers
    assert pyg_twice == pytest.approx(pyg / 2, abs=1e-4)
    assert documented_twice == documented
    assert abs(pyg - documented) > 0.1


def test_fact_3_pairs_and_triplets_are_one_function_unless_the_hyperedge_is_a_neuron(capsys):
    apart = dict(re.findall(r"(\w+): pairs and triplets differ by (\S+)", shown(3, capsys)))
    assert float(apart["HypergraphConv"]) < 1e-12
    assert float(apart["HNHN"]) > 1e-3


def test_fact_3_the_propagation_of_a_complete_graph_is_the_formula(capsys):
    rate, off = re.findall(r"= ([0-9.]+): off by (\S+)", shown(3, capsys))[0]
    assert float(rate) == (5 - 2) / (2 * 4)
    assert float(off) < 1e-12


def test_fact_4_probabilities_are_those_of_the_spec(capsys):
    text = shown(4, capsys)
    assert re.findall(r"probability (\S+)", text) == ["0.85", "0.17"]
    assert "nan" in text


def test_fact_5_what_mixes_tokens_is_refused(capsys):
    text = shown(5, capsys)
    assert text.count("its future") == 2


def test_all_five_and_nothing_else(capsys):
    assert five_facts.main(["6"]) == 2
    assert "error: 6" in capsys.readouterr().err
    state = torch.get_rng_state()
    assert five_facts.main([]) == 0
    text = capsys.readouterr().out
    assert [f"Fact {number}:" in text for number in range(1, 6)] == [True] * 5
    torch.set_rng_state(state)
