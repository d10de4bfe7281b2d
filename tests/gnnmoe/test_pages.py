"""The code on pages about the model works, from the text of the pages."""

import re
from pathlib import Path

import torch

from gnnmoe import build_coupler
from gnnmoe.hypergraph.strategies import static_hyperedges
from tests.gnnmoe._support import assert_near, normal, small_config

REPOSITORY = Path(__file__).parents[2]


def code_of(page: str, heading: str) -> list[str]:
    """Return the Python blocks of a section."""
    _, section = (REPOSITORY / page).read_text().split(f"\n## {heading}\n")
    return re.findall(r"```python\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)


def test_the_model_in_python_trains_two_steps():
    [source] = code_of("docs/python.md", "The model in Python")
    losses: list[torch.Tensor] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        exec(source.replace("    loss.b", "    see(loss.detach())\n    loss.b"), {"see": losses.append})
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_the_coupler_layer_and_strategy_of_contributing_are_built(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    coupler, others = code_of("CONTRIBUTING.md", "A coupler of your own")
    Path("loudest.py").write_text(coupler)
    Path("mine.py").write_text(others)
    page = (REPOSITORY / "CONTRIBUTING.md").read_text()
    x = normal(2, 3, 4, 6).float()
    loudest = build_coupler(small_config(coupler_type=re.findall(r"--coupler (\S+py:\S+)", page)[0]))
    shares = x.norm(dim=-1).softmax(-1)
    assert_near(loudest(x), loudest.combiner(torch.einsum("ble,bled->bld", shares, x)), torch.float32)
    layer, strategy = re.findall(r"--hgnn-conv-type (\S+py:\S+) --static-hyperedge-strategy (\S+)", page)[0]
    assert static_hyperedges(4, strategy) == [(0, 1), (1, 2), (1, 3)]
    own, plain = (
        build_coupler(small_config(hgnn_conv_type=name, static_hyperedge_strategy=strategy))
        for name in (layer, "MeanPooling")
    )
    own.load_state_dict(plain.state_dict())
    assert_near(own(x), plain(x), torch.float32)
