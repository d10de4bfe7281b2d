"""Every message about a wrong sweep file."""

from __future__ import annotations

import pytest

from bench.sweep.specification import load_sweep


@pytest.fixture
def refusal(tmp_path):
    """What is said about a file that is refused: one message that names the file."""

    def refusal(text: str) -> str:
        (tmp_path / "some.toml").write_text(text)
        with pytest.raises(ValueError, match=r"[.?]$") as refused:
            load_sweep(tmp_path / "some.toml")
        said = str(refused.value)
        assert said.startswith(f"sweep {tmp_path / 'some.toml'}")
        assert said.count("\n") in (0, 2), "a condition has two more lines: its text, and what is allowed"
        return said

    return refusal


GRID = "[grid]\nnum_experts = [2, 4]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it is empty; allowed: base, grid, zip, where, random, union, seeds"),
        ("seeds = ", "is not TOML: Invalid value (at"),
        ("gird = 3", "unknown key 'gird'; allowed: base, grid, hypotheses"),
        ("num_experts = 3", "It is a flag: put it into [base]."),
        ("base = 3", "base is 3; it must be a block, [base]"),
        ("[grid]", "[grid] is empty; give it flags with lists of values"),
        ("[base]\nnum_expert = 3", "[base]: unknown key 'num_expert'; python -m bench.run --help-all lists"),
        ("[grid]\nnum_expert = [3]", "Did you mean 'num_experts'?"),
        ("[base]\nnum_experts = 'four'", "[base]: num_experts is 'four'; it must be a whole number"),
        ("[base]\npreset = 'basline'", "[base]: preset is 'basline'; it must be one of 'baseline', 'full'"),
        ("[grid]\npreset = ['quick', 'ful']", "[grid]: item 2 of preset is 'ful'; it must be"),
        ("[grid]\nnum_experts = 4", "[grid]: num_experts is 4; it must be a list of values, each a"),
        ("[grid]\nnum_experts = []", "[grid]: num_experts is an empty list; give it at least one value"),
        ("[grid]\nnum_experts = [2, 'x']", "[grid]: item 2 of num_experts is 'x'; it must be a whole number"),
        ("[zip]\nnum_experts = [2, 2.5]", "[zip]: item 2 of num_experts is 2.5; it must be a whole number"),
        ("[grid]\ncoupler_option = ['k=2']", "item 1 of coupler_option is 'k=2'; it must be a list of text"),
        ("[zip]\nnum-experts = [2]\nembed_dim = [2, 4]",
         "[zip]: the lists must be equally long; num-experts has 1, embed_dim has 2"),
        ("[base]\ncoupler = 'GNN'\ncoupler_type = 'mean'",
         "coupler_type in [base] and coupler in [base] are the same flag; keep one of them"),
        ("[base]\ncoupler = 'GNN'\n[grid]\ncoupler-type = ['mean']",
         "coupler-type in [grid] and coupler in [base] are the same flag"),
        ("[grid]\ncoupler = ['GNN']\n[zip]\ncoupler = ['mean']", "coupler in [zip] and coupler in [grid]"),
        ("[grid]\nseed = [1, 2]", "[grid]: seed cannot be set here: the seeds of all runs stand at the top"),
        ("[base]\nstudy = 'x'", "[base]: study cannot be set here: the study of all runs stands at the top"),
        ("[grid]\nresults-dir = ['x']", "results-dir cannot be set here: the sweep sets it itself"),
        *((f"[base]\n{key} = true", f"{key} cannot be set here: the sweep sets it itself")
          for key in ("resume", "run_name")),
        ("[base]\ncheckpoint_dir = 'x'", "every run of a sweep has its own checkpoint"),
        (GRID + "where = 'quiet'", "[grid]: where is no flag and cannot stand here; put it above the first"),
        ("seeds = 0", "seeds is 0: a sweep of zero runs; it must be a number of seeds (10 means 0 to 9) or"),
        ("seeds = [0, -1]", "seeds is [0, -1]: -1 is negative"),
        ("seeds = [1, 2, 1]", "seeds is [1, 2, 1]: 1 stands there twice"),
        ("seeds = 'x'", "seeds is 'x'; it must be a number of seeds"),
        ("seeds = 1000000000000", "seeds gives more than 10000 seeds"),
        ("study = 3", "study is 3; it must be text"),
        ("study = 'a/b'", "study is 'a/b'; it must be a plain folder name"),
        ("random = 3", "random is 3; it must be a block, [random]"),
        ("[random]\nm = 3", "[random]: unknown key 'm'; allowed: n, seed"),
        ("[random]\nseed = 3", "[random] has no n; say how many configurations to draw"),
        ("[random]\nn = 0", "[random]: n is 0; it must be a whole number of at least 1"),
        ("[random]\nn = 2\nseed = -1", "[random]: seed is -1; it must be a whole number of at least 0"),
        (GRID + "[random]\nn = 3", "[random]: n is 3; it must be at most 2, all configurations there are"),
        ("where = 3", "where is 3; it must be text: a condition on flags"),
        ("where = 'num_expert > 2'", "where: 'num_expert' is no flag of a run. Did you mean 'num_experts'?"),
        ("[[union]]\nwhere = 'coupler > 2'", "[[union]] part 1: where: 'HGNN' (text) stands where"),
        ("where = 'num_experts > 4'\n" + GRID,
         "a sweep of zero runs: where = 'num_experts > 4' removes all 2 configurations"),
        ("union = []", "union has no parts: a sweep of zero runs"),
        ("[union]\n[union.grid]\nnum_experts = [2]", "each with the heading [[union]]"),
        ("[[union]]\n[[union]]\nseeds = 3",
         "[[union]] part 2: unknown key 'seeds'; allowed: base, grid, random, where, zip. It stands"),
        ("[[union]]\n[union.gird]\nnum_experts = [3]", "Did you mean 'grid'?"),
        ("[[union]]\n[[union]]\n[union.grid]\nnum_experts = 3",
         "[[union]] part 2: [union.grid]: num_experts is 3; it must be a list"),
        (GRID + "[[union]]\n[union.base]\nnum-experts = 3",
         "[[union]] part 1: num-experts in [union.base] and num_experts in [grid] are the same flag"),
        (GRID + "[[union]]\n[[union]]\nwhere = 'num_experts > 4'",
         "[[union]] part 2: a sweep of zero runs: where = 'num_experts > 4' removes all 2 configurations"),
        ("where = 'num_experts > 4'\n" + GRID + "[[union]]\nrandom = {n = 9}\n[[union]]\nwhere = 'plots'",
         "a sweep of zero runs: where = 'num_experts > 4' removes all 4 configurations"),
        ("[[union]]\nrandom = {n = 2}", "[[union]] part 1: [random]: n is 2; it must be at most 1"),
    ],
)  # fmt: skip
def test_the_messages(refusal, text, said):
    assert said in refusal(text)


LONG = "x" * 3000


@pytest.mark.parametrize(
    "text",
    [
        f"seeds = {[-1] * 3000}",
        f"seeds = {[True] * 3000}",
        f"seeds = [0x{'f' * 6000}, 0x{'f' * 6000}]",
        f"seeds = '{LONG}'",
        f"study = ['{LONG}']",
        f"random = '{LONG}'",
        f"[random]\nn = '{LONG}'",
        f"where = ['{LONG}']",
        f"where = '{LONG} > 2'",
        f"where = 'lambda: {LONG}'",
        f"where = \"num_experts > '{LONG}'\"",
        f"where = \"coupler == '{LONG}'\"\n{GRID}",
        f"{LONG} = 1",
        f"[base]\n{LONG} = 1",
        f"[base]\nnum_experts = '{LONG}'",
    ],
)
def test_a_long_value_gives_no_long_message(refusal, text):
    message = refusal(text).partition(": ")[2]
    assert max(map(len, message.splitlines())) <= 240, message


def test_too_large_a_sweep_is_refused_before_it_is_written_down(refusal):
    values = list(range(1, 1001))
    assert "1000000000 configurations; a sweep looks at no more than 200000" in refusal(
        f"[grid]\nnum_experts = {values}\nnum_layers = {values}\nembed_dim = {values}"
    )
    assert "1000 configurations × 1000 seeds; a sweep has at most 200000 runs" in refusal(
        f"seeds = 1000\n[grid]\nnum_experts = {values}"
    )


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"absent\.toml cannot be read: No such file"):
        load_sweep(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        load_sweep(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"binary\.toml is not TOML: 'utf-8'"):
        load_sweep(tmp_path / "binary.toml")
    (tmp_path / "my sweep.toml").write_text(GRID)
    with pytest.raises(ValueError, match="study is 'my sweep'; it must be a plain folder name"):
        load_sweep(tmp_path / "my sweep.toml")
