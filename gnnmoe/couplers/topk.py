"""The sparse mixture of experts that is in use today: a router and its k best experts for each token.

Shapes: B batch, L length, E experts, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from gnnmoe.config import GNNMoEConfig, Refused
from gnnmoe.couplers.gate import GateCoupler
from gnnmoe.couplers.registry import register_coupler

DEFAULT_K = 2


@register_coupler("topk")
class TopKCoupler(GateCoupler):
    r"""A weighted sum of the k experts that a router prefers, token by token, then the combiner.

    .. math:: r = W_g u, \quad y = \mathrm{combiner}(\sum_{e \in T} g_e x_e), \quad
              T = \mathrm{top}_k(r)
    .. math:: g = \mathrm{softmax}(r_T) \;(k \ge 2), \qquad g_e = \mathrm{softmax}(r)_e \;(k = 1)

    with :math:`u` (B, L, D) the layer's input and :math:`W_g` as in ``gate``. With equal logits the first
    expert is preferred. All experts run in this project, so :math:`g` is dense, with zeros, and no FLOPs are
    saved.

    Losses: ``load_balance`` :math:`\alpha E \sum_e f_e P_e`, with :math:`f_e` the share of all
    (token, slot) assignments that go to expert e and :math:`P_e` its mean probability; it is α at perfect
    balance. ``z_loss`` :math:`\beta\, \mathrm{mean}(\mathrm{logsumexp}(r)^2)`.

    Options: ``k``; ``load_balance_alpha`` (α); ``z_loss_weight`` (β).

    Shapes:
        - **expert_outputs:** :math:`(B, L, E, D)`
        - **output:** :math:`(B, L, D)`

    Source: k = 1, load balance and float32 router of Fedus, Zoph and Shazeer, "Switch
    transformers", 2021 (arXiv:2101.03961); softmax over the chosen of Jiang et al., "Mixtral of
    experts", 2024 (arXiv:2401.04088); z-loss of Zoph et al., "ST-MoE", 2022 (arXiv:2202.08906).
    """

    config_fields = ()

    def __init__(
        self,
        config: GNNMoEConfig,
        *,
        k: int = DEFAULT_K,
        load_balance_alpha: float = 1e-2,
        z_loss_weight: float = 1e-3,
    ) -> None:
        super().__init__(config)
        if not 1 <= k <= max(config.num_experts, DEFAULT_K):  # the default fits a single expert too
            raise Refused(
                f"topk: k is {k}; it must be a whole number from 1 to num_experts {config.num_experts}."
            )
        for name, value in (("load_balance_alpha", load_balance_alpha), ("z_loss_weight", z_loss_weight)):
            if not 0.0 <= value < math.inf:
                raise Refused(f"topk: {name} is {value}; it must be a finite number of at least 0.")
        self.k = min(k, config.num_experts)
        self.load_balance_alpha, self.z_loss_weight = load_balance_alpha, z_loss_weight

    @classmethod
    def canonical_options(cls, config: GNNMoEConfig, options: dict[str, Any]) -> dict[str, Any]:
        """Return k as it is used: at most the number of experts."""
        return {**options, "k": min(options["k"], config.num_experts)}

    def _chosen(self, logits_BLE: Tensor) -> Tensor:
        """Return booleans (B, L, E), of which k are true for each token; a stable sort breaks ties."""
        best_BLk = logits_BLE.argsort(dim=-1, descending=True, stable=True)[..., : self.k]
        return torch.zeros_like(logits_BLE).scatter(-1, best_BLk, 1.0).bool()

    def _weights(self, logits_BLE: Tensor) -> Tensor:
        """Return the weights (B, L, E), 0 for experts that are not chosen."""
        others_BLE = ~self._chosen(logits_BLE)
        if self.k == 1:  # the softmax over one logit is 1: the router would never learn
            return logits_BLE.softmax(-1).masked_fill(others_BLE, 0.0)
        return logits_BLE.masked_fill(others_BLE, -math.inf).softmax(-1)

    def reference(self, expert_outputs: Tensor, layer_input: Tensor | None = None) -> Tensor:
        """Loop over experts: an expert is chosen where fewer than k experts come before it."""
        layer_input = self._needed(layer_input)
        logits = [(layer_input * w).sum(-1, keepdim=True) for w in self.router.weight]
        total, scale = expert_outputs.new_zeros(()), expert_outputs.new_zeros(())
        for i, mine in enumerate(logits):
            ahead = torch.zeros_like(mine)
            for j, other in enumerate(logits):
                ahead = ahead + ((other > mine) | (other == mine) & (j < i))
            chosen = (ahead < self.k).to(mine.dtype)
            total = total + chosen * mine.exp() * expert_outputs[:, :, i]
            scale = scale + mine.exp() * (1.0 if self.k == 1 else chosen)
        return self.combiner(total / scale)

    def auxiliary_losses(
        self, expert_outputs: Tensor, layer_input: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return ``load_balance`` and ``z_loss``, times the weights of the options."""
        logits_BLE = self._logits(layer_input)
        num_experts = logits_BLE.shape[-1]
        balance = num_experts * (self._load(logits_BLE) * logits_BLE.softmax(-1).mean((0, 1))).sum()
        z_BL = logits_BLE.logsumexp(-1)
        # The z-loss keeps logits small, so that rounding does not decide the route. With a single expert
        # there is no route: the z-loss would be the only gradient of an otherwise inert parameter.
        z_weight = self.z_loss_weight if num_experts > 1 else 0.0
        return {
            "load_balance": self.load_balance_alpha * balance,
            "z_loss": z_weight * z_BL.square().mean(),
        }

    def _load(self, logits_BLE: Tensor) -> Tensor:
        """Return the share (E) of all (token, slot) assignments that go to each expert, detached."""
        return self._chosen(logits_BLE.detach()).to(logits_BLE.dtype).mean((0, 1)) / self.k

    def _routing(self, logits_BLE: Tensor) -> dict[str, Tensor]:
        """Return ``expert_load`` (E), the share of assignments, and ``gate_weights`` (E)."""
        return {"expert_load": self._load(logits_BLE), **super()._routing(logits_BLE)}
