"""Conditions: what may stand in them, what they are worth, and one message of three lines for the rest."""

from __future__ import annotations

from typing import Any

import pytest

from bench.config import complete
from bench.sweep.specification import Condition
from gnnmoe.config import Refused

FLAGS = {"coupler_type": "HGNN", "num_experts": 4, "epochs": None, "plots": True, "coupler_option": ["k=2"]}


def holds(text: str, **flags: Any) -> bool:
    return Condition(text).holds({**complete({}), **FLAGS, **flags})


def test_what_holds():
    for text, expected in (
        ("2 < num_experts <= 4", True),
        ("coupler == 'HGNN' and coupler_type in ['GNN', 'HGNN']", True),
        ("coupler not in ['GNN', 'HGNN'] or num_experts in [2, 8]", False),
        ("plots and not (num_experts >= 5)", True),
        ("plots == true and plots != False", True),
        ("epochs == None and epochs == 'None' and epochs in [None, 3]", True),
        ("epochs != None and epochs > 3", False),
        ("'k=2' in coupler_option", True),
        ("adam_betas == [0.9, 0.999] or adam_betas != [0.9, 0.999]", True),
        ("(num_experts + 2) * 3 - 8 / 2 == 14 and -num_experts % 3 == 2", True),
        ("\n  num_experts == 4  # and every embed_dim\n  and plots\n", True),
    ):
        assert holds(text) is expected, text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (" \n", "it is empty"),
        ("num_expert > 2", "'num_expert' is no flag of a run. Did you mean 'num_experts'?"),
        ("plots or num_expert > 2", "'num_expert' is no flag"),
        ("seed > 2", "seed cannot stand there: the seeds of all runs stand at the top"),
        ("plots and", "it cannot be read (invalid syntax)"),
        ("coupler = 'GNN'", "it cannot be read (invalid syntax"),
        (
            "plots or __import__('os').system('true')",
            "\"__import__('os').system('true')\" cannot stand there",
        ),
        ("coupler.upper == 'HGNN'", "'coupler.upper' cannot stand there"),
        ("num_experts in (2, 4)", "'(2, 4)' cannot stand there"),
        ("2 ** 9 ** 9 > 1", "'2 ** 9 ** 9' cannot stand there"),
        ("epochs is None", "'epochs is None' cannot stand there"),
        ("num_experts", "its result is 4 (a number), and must be true or false; compare it with a value"),
        ("not coupler", "'HGNN' (text) stands after not, where true or false must stand"),
        ("num_experts == '4'", "4 (a number) and '4' (text) cannot be compared"),
        ("coupler in ['GNN', 3]", "'HGNN' (text) and 3 (a number) cannot be compared"),
        ("'HG' in coupler", "'HGNN' (text) stands after in, where a list must stand"),
        ("epochs > 3", "None stands where a number must stand; ask for != None first"),
        ("num_experts % 0 == 1", "integer modulo by zero"),
        ("(" * 900 + "plots" + ")" * 900, "it cannot be read (too many nested parentheses)"),
        ("1" + "+1" * 900 + " > 0", "maximum recursion depth exceeded"),
    ],
)
def test_any_other_is_refused_in_three_lines(text, said):
    """What is wrong, in which condition, what is allowed; also where no run would have come to that part."""
    with pytest.raises(Refused) as refused:
        holds(text)
    wrong, condition, allowed = str(refused.value).split("\n")
    assert wrong.startswith("where: ")
    assert said in wrong
    assert condition.startswith("The condition is: ")
    assert text[:500].strip() in condition or condition.endswith("…")
    assert allowed.startswith("It may hold flags, numbers, text in quotes")
    assert len(str(refused.value)) < 700
