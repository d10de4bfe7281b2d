"""Five facts about coupling experts, each computed here and now: ``python -m examples.five_facts 1``.

Without a number all five are shown. ``docs/couplers.md`` explains them.
"""

from __future__ import annotations

import sys
import warnings

import torch
from torch import Tensor, nn
from torch_geometric.nn import HypergraphConv

from bench.check.leak_check import run_leak_check
from gnnmoe.config import GNNMoEConfig
from gnnmoe.couplers.base import Coupler
from gnnmoe.couplers.registry import build_coupler
from gnnmoe.hypergraph.propagation import hyperedge_index, incidence, propagation_matrix
from gnnmoe.hypergraph.strategies import static_hyperedges


def leak() -> None:
    """Fact 1: PyG's Batch shifts hyperedge ids by E instead of M, and tokens see each other where M > E."""
    for experts, strategy in ((3, "all_pairs"), (4, "all_pairs"), (4, "all_triplets"), (5, "all_triplets")):
        config = GNNMoEConfig(
            coupler_type="examples.leaking_coupler:LeakingCoupler", num_experts=experts,
            static_hyperedge_strategy=strategy, embed_dim=8, max_seq_length=16,
        )  # fmt: skip
        check = run_leak_check(config).checks[0]
        edges = len(static_hyperedges(experts, strategy))
        verdict = "no token sees another" if check.passed else check.detail
        print(f"  E {experts}, M {edges:2} ({strategy}): {verdict}")


def weights_that_weigh_nothing() -> None:
    """Fact 2: PyG documents D⁻¹ H W B⁻¹ Hᵀ X Θ and leaves W out; doubled weights halve its output."""
    index = torch.tensor([[0, 0, 1, 1, 2, 3], [0, 1, 0, 1, 0, 1]])
    weights = torch.tensor([1.0, 0.5], dtype=torch.float64)
    x = torch.arange(1.0, 5.0, dtype=torch.float64)[:, None]
    conv = HypergraphConv(1, 1, bias=False).double()
    nn.init.ones_(conv.lin.weight)
    H_EM = incidence(index, 4, 2)
    for factor in (1, 2):
        documented = (propagation_matrix(H_EM, factor * weights, "HypergraphConv") @ x)[0]
        print(f"  weights × {factor}: PyG {conv(x, index, factor * weights)[0].item():.4f}, "
              f"documented formula {documented.item():.4f} (expert 0)")  # fmt: skip


def linear() -> None:
    """Fact 3: without an activation a static hypergraph stack is mean + Linear, whatever its order."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    for conv_type in ("HypergraphConv", "HNHN"):
        outputs = []
        for strategy in ("all_pairs", "all_triplets"):
            config = GNNMoEConfig(
                num_experts=5, embed_dim=8, static_hyperedge_strategy=strategy, hgnn_conv_type=conv_type,
                hgnn_learnable_edge_weights=False,
                coupler_options={"activation": "none", "residual": "false"},
            )  # fmt: skip
            torch.manual_seed(0)
            outputs.append(build_coupler(config).double()(x))
        print(f"  {conv_type}: pairs and triplets differ by {(outputs[0] - outputs[1]).abs().max():.1e}")
    E, k = 5, 2
    members = static_hyperedges(E, "all_pairs")
    H_EM = incidence(hyperedge_index(members), E, len(members))
    rate = (E - k) / (k * (E - 1))
    mean = torch.full((E, E), 1 / E, dtype=torch.float64)
    P_EE = propagation_matrix(H_EM, torch.ones(len(members), dtype=torch.float64), "HypergraphConv")
    off = (P_EE - rate * torch.eye(E) - (1 - rate) * mean).abs().max()
    print(f"  P = λ I + (1 − λ) 1 1ᵀ / E with λ = (E − k) / (k (E − 1)) = {rate:.3f}: off by {off:.1e}")


def random_signs() -> None:
    """Fact 4: weights drawn from N(0, 1) make degrees negative or nearly 0."""
    generator = torch.Generator().manual_seed(0)
    members = static_hyperedges(4, "all_pairs")
    H_EM = incidence(hyperedge_index(members), 4, 6)
    degrees = torch.randn(200_000, 6, generator=generator, dtype=torch.float64) @ H_EM.T
    print(f"  a negative degree somewhere: probability {(degrees < 0).any(1).double().mean():.2f}")
    print(f"  |1 / D| > 10 somewhere: probability {(degrees.abs() < 0.1).any(1).double().mean():.2f}")
    weights = torch.tensor([1.0, -1.0], requires_grad=True)
    conv = HypergraphConv(1, 1)
    conv(torch.ones(2, 1), torch.tensor([[0, 0, 1], [0, 1, 0]]), weights).sum().backward()
    print(f"  PyG's gradient of the weights at D = 0: {weights.grad}")


class SoftMoE(Coupler):
    """Slots that are means over the tokens (Puigcerver et al., 2023, arXiv:2308.00951), to be refused.

    .. math:: y_t = \\sum_e C_{te} \\sum_s D_{se} x_{se}, D a softmax over tokens, C over experts

    Shapes: (B, L, E, D) → (B, L, D). Source: arXiv:2308.00951, with one slot an expert.
    """

    def __init__(self, config: GNNMoEConfig) -> None:
        super().__init__(config)
        self.scores = nn.Linear(config.embed_dim, config.num_experts, bias=False)

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Mix over tokens and experts."""
        assert layer_input is not None
        scores_BLE = self.scores(layer_input)
        slots_BED = (scores_BLE.softmax(1)[..., None] * expert_outputs).sum(1)
        return self.combiner(scores_BLE.softmax(2) @ slots_BED)

    reference = forward


class ExpertChoice(SoftMoE):
    """Each expert takes the tokens that score highest (Zhou et al., 2022, arXiv:2202.09368), to be refused.

    .. math:: y_t = \\sum_{e : t \\in \\mathrm{top}_c(e)} p_{te} x_{te}

    Shapes: (B, L, E, D) → (B, L, D). Source: arXiv:2202.09368.
    """

    def forward(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Let each expert choose half of the tokens of a sequence."""
        assert layer_input is not None
        shares_BLE = self.scores(layer_input).softmax(2)
        least = shares_BLE.topk(max(1, shares_BLE.shape[1] // 2), dim=1).values[:, -1:]
        chosen_BLE = shares_BLE * (shares_BLE >= least)
        return self.combiner((chosen_BLE[..., None] * expert_outputs).sum(2))

    reference = forward


def not_causal() -> None:
    """Fact 5: Soft MoE and expert choice mix tokens, so a language model with them reads its labels."""
    for name in ("SoftMoE", "ExpertChoice"):
        config = GNNMoEConfig(coupler_type=f"examples.five_facts:{name}", embed_dim=8, max_seq_length=16)
        print(f"  {name}: {run_leak_check(config).checks[0].detail}")


FACTS = (leak, weights_that_weigh_nothing, linear, random_signs, not_causal)


def main(arguments: list[str]) -> int:
    """Show the facts that ``arguments`` number, or all."""
    warnings.simplefilter("ignore")
    wrong = [argument for argument in arguments if argument not in {"1", "2", "3", "4", "5"}]
    if wrong:
        print(f"error: {wrong[0]} is no fact; give numbers from 1 to 5.", file=sys.stderr)
        return 2
    for number in [int(argument) for argument in arguments] or range(1, 6):
        fact = FACTS[number - 1]
        print((fact.__doc__ or "").splitlines()[0])
        fact()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
