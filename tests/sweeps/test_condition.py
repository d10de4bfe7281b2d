"""Conditions: every operator against Python's own, every message, and nothing that could be executed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.sweeps.condition import parse_condition

VALUES = {
    "coupler_type": "HGNN", "num_experts": 4, "learning_rate": 0.25, "quiet": True, "epochs": None,
    "adam_betas": [0.9, 0.95], "coupler_option": ["k=2"], "static": "all_triplets",
}  # fmt: skip
NAMES = {**{name: name for name in VALUES}, "coupler": "coupler_type"}


def holds(text: str, **values: object) -> bool:
    return parse_condition(text, NAMES, {"seed": "use seeds"}).holds({**VALUES, **values})


def refusal(text: str) -> str:
    """What is said where the text is refused, when it is read or when it meets the values."""
    with pytest.raises(ValueError, match=r".") as refused:
        holds(text)
    assert str(refused.value).endswith(".")
    return str(refused.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_experts == 4", True),
        ("num_experts == 4.0", True),
        ("num_experts != 4", False),
        ("num_experts < 4", False),
        ("num_experts <= 4", True),
        ("num_experts > 3.5", True),
        ("num_experts >= 5", False),
        ("2 < num_experts <= 4", True),
        ("2 < num_experts < 4 < 1", False),
        ("coupler == 'HGNN'", True),
        ('coupler_type == "GNN"', False),
        ("coupler in ['GNN', 'HGNN']", True),
        ("coupler not in ['GNN', 'HGNN']", False),
        ("num_experts in [2, 8]", False),
        ("epochs in [None, 3]", True),
        ("'k=2' in coupler_option", True),
        ("'k=3' not in coupler_option", True),
        ("adam_betas == [0.9, 0.95]", True),
        ("adam_betas in [[0.8, 0.9]]", False),
        ("quiet", True),
        ("not quiet", False),
        ("quiet == true and quiet == True", True),
        ("quiet == false or quiet != False", True),
        ("epochs == None", True),
        ("epochs == 'None'", True),
        ("epochs != 3", True),
        ("epochs != None and epochs > 3", False),
        ("num_experts != None", True),
        ("num_experts >= 5 or static != 'all_triplets' or quiet", True),
        ("(num_experts >= 5 or quiet) and not (coupler == 'GNN')", True),
        ("num_experts + 1 == 5", True),
        ("num_experts - 1 == 3", True),
        ("num_experts * learning_rate == 1", True),
        ("num_experts / 8 == 0.5", True),
        ("num_experts % 3 == 1", True),
        ("-num_experts == +2 - 6", True),
        ("1 + 2 * 3 == 7 and (1 + 2) * 3 == 9", True),
        ("1_000 == 1e3", True),
        ("static == 'é' or coupler == 'HGNN'", True),
        ("true", True),
        ("\n  num_experts == 4\n    and quiet\n", True),
    ],
)
def test_what_holds(text, expected):
    assert holds(text) is expected


def test_the_same_condition_serves_many_runs():
    condition = parse_condition("num_experts >= 3 or coupler == 'GNN'", NAMES)
    found = [condition.holds({**VALUES, "num_experts": count}) for count in range(6)]
    assert found == [False] * 3 + [True] * 3


numbers = st.recursive(
    st.integers(0, 9).map(str) | st.just("num_experts") | st.just("learning_rate"),
    lambda inner: st.tuples(inner, st.sampled_from("+-*"), inner).map(lambda parts: f"({' '.join(parts)})"),
    max_leaves=4,
)
comparisons = st.tuples(numbers, st.sampled_from("== != < <= > >=".split()), numbers).map(" ".join)
conditions = st.recursive(
    comparisons,
    lambda inner: (
        st.tuples(inner, st.sampled_from(["and", "or"]), inner).map(" ".join)
        | inner.map(lambda text: f"not ({text})")
        | inner.map(lambda text: f"({text})")
    ),
    max_leaves=6,
)


@given(conditions)
def test_precedence_and_values_are_pythons(text):
    assert holds(text) == eval(text, {"__builtins__": {}}, dict(VALUES))


@given(st.text(alphabet="num_experts()[]{}'\"=<>!:.,;#\\ \n0aé@`$&|^~*-+/%λ", max_size=40))
def test_any_other_text_is_refused_with_a_plain_message(text):
    try:
        assert holds(text) in (True, False)
    except ValueError as error:
        said = str(error)
        assert "column" in said or "condition" in said


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "coupler.__class__",
        "coupler.upper() == 'HGNN'",
        "coupler[0] == 'H'",
        "[x for x in [1]] == [1]",
        "(x for x in [1])",
        "{1: 2} == {1: 2}",
        "num_experts in {2, 4}",
        "num_experts in (2, 4)",
        "(lambda: True)()",
        "lambda: True",
        "len(coupler) == 4",
        "(x := 4) == 4",
        "f'{coupler}' == 'HGNN'",
        "2 ** 9 ** 9 > 1",
        "num_experts // 2 == 2",
        "num_experts | 1 == 5",
        "num_experts << 9 == 1",
        "~num_experts == 1",
        "epochs is None",
        "epochs is not None",
        "True if quiet else False",
        "b'x' == b'x'",
        "2j == 2j",
        "... == ...",
        "[*adam_betas] == [1]",
        "(yield)",
        "(await coupler)",
        "`coupler`",
        "coupler = 'GNN'",
        "quiet; quiet",
        "quiet # and not quiet",
        "quiet\n# no\nand not quiet",
        "quiet && quiet",
        "quiet and",
        "(quiet",
        "quiet)",
        "coupler == 'HGNN",
        "quiet \x00",
        "coupler == '\\d'",
        "import os",
        "del coupler",
    ],
)
def test_everything_else_is_refused_with_what_is_allowed(text):
    said = refusal(text)
    assert "allowed are flags" in said or "write " in said
    assert "column" in said or "is not understood" in said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the condition is empty"),
        (" \n ", "the condition is empty"),
        ("num_expert > 2", "column 1: unknown name 'num_expert'; allowed: adam_betas, coupler"),
        ("num_expert > 2", "Did you mean 'num_experts'?"),
        ("quiet and num_expert > 2", "column 11: unknown name"),
        ("coupler == 'é' and nope == 2", "column 20: unknown name 'nope'"),
        ("seed > 2", "column 1: seed cannot stand here: use seeds"),
        ("__import__ == 2", "unknown name '__import__'"),
        ("num_experts == '4'", "num_experts = 4 (a number) and '4' (text) cannot be compared"),
        ("coupler == 3", "coupler = 'HGNN' (text) and 3 (a number) cannot be compared"),
        ("coupler != 3", "coupler = 'HGNN' (text) and 3 (a number) cannot be compared"),
        ("quiet == 1", "quiet = True (true or false) and 1 (a number) cannot be compared"),
        ("coupler in ['GNN', 3]", "coupler = 'HGNN' (text) and 3 (a number) cannot be compared"),
        ("adam_betas == 0.9", "adam_betas = [0.9, 0.95] (a list) and 0.9 (a number) cannot be compared"),
        ("coupler < 3", "column 1: coupler = 'HGNN' (text) has no order; only numbers have one"),
        ("3 < 'a'", "column 5: 'a' (text) has no order"),
        ("epochs > 3", "epochs = None has no order; only numbers have one; ask for != None first"),
        ("quiet > 0", "quiet = True (true or false) has no order"),
        ("num_experts in 4", "column 16: 4 (a number) must be a list, after in"),
        ("'HG' in coupler", "coupler = 'HGNN' (text) must be a list, after in"),
        ("num_experts in []", "column 16: the list is empty"),
        ("num_experts", "num_experts = 4 (a number) must be true or false; compare it with a value"),
        ("not coupler", "column 5: coupler = 'HGNN' (text) must be true or false"),
        ("quiet and num_experts", "column 11: num_experts = 4 (a number) must be true or false"),
        ("num_experts + 1", "5 (a number) must be true or false"),
        ("None", "None must be true or false"),
        (
            "coupler + 'x' == 'HGNNx'",
            "coupler = 'HGNN' (text) cannot be calculated with; it must be a number",
        ),
        ("quiet + 1 == 2", "quiet = True (true or false) cannot be calculated with"),
        ("-coupler == 2", "column 2: coupler = 'HGNN' (text) cannot be calculated with"),
        ("num_experts % 0 == 1", "column 1: 'num_experts % 0' has no value: "),
        ("num_experts / (4 - 4) == 1", "has no value: division by zero"),
        (f"1{'0' * 400} / 3 == 1", "has no value"),
        ("num_experts in (2, 4)", "column 16: '(2, 4)' cannot stand here; write a list, [..]"),
        ("epochs is None", "column 1: 'epochs is None' cannot stand here; write =="),
        ("epochs is not None", "write !="),
        ("coupler.lower == 2", "column 1: 'coupler.lower' cannot stand here; allowed are flags, numbers"),
        ("quiet # no", "column 7: a comment cannot stand here"),
        ("quiet and", "column 10: the end is not understood; allowed are"),
        ("coupler = 'GNN'", "is not understood"),
    ],
)
def test_the_messages(text, said):
    assert said in refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "quiet and " * 1000 + "quiet",
        "(" * 900 + "quiet" + ")" * 900,
        "not " * 400 + "quiet",
        "-" * 1900 + "1 == 1",
        "1" + "+1" * 900 + " > 0",
        "[" * 150 + "]" * 150 + " == 1",
        "9" * 5000 + " > 0",
        "num_experts == " + "9*" * 500 + "9",
    ],
)
def test_long_and_deep_conditions_are_refused(text):
    said = refusal(text)
    assert any(part in said for part in ("at most 2000", "deeper than 100", "not understood"))


def test_what_may_still_be_long():
    assert holds(" or ".join(f"num_experts == {count}" for count in range(60)))
