"""The five facts of docs/couplers.md: each is shown by one command, with the numbers the page names."""

import contextlib
import io
import re

import pytest
import torch

from examples import five_facts


@pytest.fixture(scope="module")
def shown() -> dict[int, str]:
    """What one run of all five shows, by fact."""
    state, text = torch.get_rng_state(), io.StringIO()
    with contextlib.redirect_stdout(text):
        assert five_facts.main([]) == 0
    torch.set_rng_state(state)
    head, *parts = re.split(r"^(?=Fact \d:)", text.getvalue(), flags=re.MULTILINE)
    assert not head.strip()
    assert [part[:7] for part in parts] == [f"Fact {number}:" for number in range(1, 6)]
    return dict(enumerate(parts, start=1))


@pytest.mark.slow
def test_fact_1_merges_where_there_are_more_hyperedges_than_experts(shown):
    lines = [line for line in shown[1].splitlines()[1:] if line.strip()]
    leaks = {tuple(map(int, re.findall(r"\d+", line)[:2])): "sees" in line and "no token" not in line
             for line in lines}  # fmt: skip
    assert leaks == {(3, 3): False, (4, 6): True, (4, 4): False, (5, 10): True}


@pytest.mark.slow
def test_fact_2_doubled_weights_halve_pygs_output_only(shown):
    numbers = [float(n) for n in re.findall(r"\d+\.\d+", shown[2])]
    pyg, documented, pyg_twice, documented_twice = numbers
    assert pyg_twice == pytest.approx(pyg / 2, abs=1e-4)
    assert documented_twice == documented
    assert abs(pyg - documented) > 0.1


def test_fact_3_pairs_and_triplets_are_one_function_unless_the_hyperedge_is_a_neuron(shown):
    apart = dict(re.findall(r"(\w+): pairs and triplets differ by (\S+)", shown[3]))
    assert float(apart["HypergraphConv"]) < 1e-12
    assert float(apart["HNHN"]) > 1e-3


def test_fact_3_the_propagation_of_a_complete_graph_is_the_formula(shown):
    rate, off = re.findall(r"= ([0-9.]+): off by (\S+)", shown[3])[0]
    assert float(rate) == (5 - 2) / (2 * 4)
    assert float(off) < 1e-12


def test_fact_4_probabilities_are_those_of_the_spec(shown):
    text = shown[4]
    assert re.findall(r"probability (\S+)", text) == ["0.85", "0.17"]
    assert "nan" in text


def test_fact_5_what_mixes_tokens_is_refused(shown):
    text = shown[5]
    assert text.count("its future") == 2


def test_one_fact_by_its_number_and_no_sixth(shown, capsys):
    assert five_facts.main(["2"]) == 0
    assert capsys.readouterr().out.strip() == shown[2].strip()
    assert five_facts.main(["6"]) == 2
    assert "error: 6" in capsys.readouterr().err
