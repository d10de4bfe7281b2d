"""Experts: transformer blocks that see every token, how they start, and all experts of a layer at once.

Shapes: B batch, L length, N = B·L tokens, E experts, D width, H heads, d = D / H, F hidden width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gnnmoe.config import GNNMoEConfig


def init_weights(module: nn.Module) -> None:
    """Draw the matrix of a linear map or an embedding from N(0, 0.02²), with a zero bias.

    The original experiments applied this rule to all modules of their model. It reaches every ``nn.Linear``
    and no bare ``nn.Parameter``. docs/couplers.md lists the standard deviations that follow.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class ExpertBlock(nn.Module):
    """One expert: causal self-attention and a feed-forward net, each after a norm and with a residual.

    Attention is causal without a mask tensor, so padding on the right changes nothing.
    """

    def __init__(self, config: GNNMoEConfig, ffn_dim: int | None = None) -> None:
        super().__init__()
        D, ffn_dim = config.embed_dim, ffn_dim or config.expert_width
        self.num_heads, self.dropout_rate = config.num_heads, config.dropout_rate
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.proj = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, ffn_dim), nn.Linear(ffn_dim, D)

    def initialize(self, initialization: str) -> None:
        """Draw the weights by ``init_weights``.

        With ``original``, queries, keys and values are one Xavier-uniform matrix (3 D, D) instead:
        ``nn.MultiheadAttention`` keeps them in a bare parameter, which starts like that.
        """
        self.apply(init_weights)
        if initialization == "original":
            nn.init.xavier_uniform_(self.qkv.weight)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return (B, L, D) for an input of the same shape; under autocast in the type of its products."""
        x_BLD = x_BLD + self._dropout(self._attention(self.norm1(x_BLD)))
        hidden = self._dropout(F.gelu(self.up(self.norm2(x_BLD))))
        added = self._dropout(self.down(hidden))
        return (x_BLD + added).to(added.dtype)

    def _attention(self, x_BLD: Tensor) -> Tensor:
        B, L, D = x_BLD.shape
        q, k, v = self.qkv(x_BLD).view(B, L, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout_rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.proj(mixed.transpose(1, 2).reshape(B, L, D))

    def _dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout_rate, self.training) if self.dropout_rate else x

    @staticmethod
    def flops(config: GNNMoEConfig, batch: int, length: int, ffn_dim: int | None = None) -> int:
        """Return the FLOPs of a forward: 2 per multiply-add, and attention without regard to causality."""
        D = config.embed_dim
        maps = 4 * D * D + 2 * D * (ffn_dim or config.expert_width)
        return 2 * batch * length * (maps + 2 * length * D)


class ExpertLoop(nn.ModuleList):
    """The experts of a layer, one after the other: the reference for ``BatchedExperts``."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the output of each expert for ``x`` (B, L, D): (B, L, E, D), a view of (E, B, L, D)."""
        return torch.stack([expert(x_BLD) for expert in self]).permute(1, 2, 0, 3)


class BatchedExperts(nn.Module):
    """The experts of a layer in a few large products. Takes over the numbers of ``blocks``.

    All experts normalise the same input to the same numbers; only gain and shift differ. So there is one
    normalisation, and gains and shifts are folded into the projections that follow. One product gives all
    queries, keys and values. One attention serves E·H heads. Every further step is one batched product over
    E. No tensor with a row per token is copied into another memory order.

    ``state_dict`` has the names and shapes of ``ExpertLoop``, and so has what can be loaded: a checkpoint of
    either form fits the other.
    """

    norm1_weight: nn.Parameter
    norm1_bias: nn.Parameter
    norm2_weight: nn.Parameter
    norm2_bias: nn.Parameter
    qkv_weight: nn.Parameter
    """(3, E, D, D), so that the heads of all experts stand side by side in q, k and v."""
    qkv_bias: nn.Parameter
    proj_weight: nn.Parameter
    proj_bias: nn.Parameter
    up_weight: nn.Parameter
    up_bias: nn.Parameter
    down_weight: nn.Parameter
    down_bias: nn.Parameter

    def __init__(self, blocks: Sequence[ExpertBlock]) -> None:
        super().__init__()
        self.count, self.num_heads = len(blocks), blocks[0].num_heads
        self.dropout = nn.Dropout(blocks[0].dropout_rate)
        self._names = [name for name, _ in blocks[0].named_parameters()]
        self._vectors = [_own(name) for name, value in blocks[0].named_parameters() if value.ndim == 1]
        for name in self._names:
            parts = [block.get_parameter(name).detach() for block in blocks]
            setattr(self, _own(name), nn.Parameter(_stacked(name, parts)))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the output of each expert for ``x`` (B, L, D): (B, L, E, D), a view of (E, B, L, D).

        Under autocast every tensor of E·N·D numbers has the autocast type, the normalised ones too.
        """
        device = x_BLD.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_BLD.dtype
        with torch.autocast(device, enabled=False):
            x_END = self._experts(x_BLD, dtype)
        return x_END.view(self.count, *x_BLD.shape).permute(1, 2, 0, 3)

    def _experts(self, x_BLD: Tensor, dtype: torch.dtype) -> Tensor:
        mixed_END = self._attention(x_BLD, dtype)
        added_END = _mapped(mixed_END, self.proj_weight, self.proj_bias)
        x_END = x_BLD.to(dtype).flatten(0, 1) + self.dropout(added_END)
        up_EFD, up_bias_EF = _folded(self.up_weight, self.up_bias, self.norm2_weight, self.norm2_bias)
        hidden_ENF = F.gelu(_mapped(F.layer_norm(x_END, x_END.shape[-1:]), up_EFD, up_bias_EF))
        return x_END + self.dropout(_mapped(self.dropout(hidden_ENF), self.down_weight, self.down_bias))

    def _attention(self, x_BLD: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the outputs of the heads of each expert, side by side: (E, N, D), a view of (N, E, D)."""
        B, L, D = x_BLD.shape
        weight_3EDD, bias_3ED = _folded(self.qkv_weight, self.qkv_bias, self.norm1_weight, self.norm1_bias)
        normed_BLD = F.layer_norm(x_BLD, (D,)).to(dtype)
        qkv = F.linear(normed_BLD, weight_3EDD.to(dtype).view(-1, D), bias_3ED.to(dtype).view(-1))
        heads = qkv.view(B, L, 3, self.count * self.num_heads, -1).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in heads)  # (B, E·H, L, d), by strides alone
        dropout = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return mixed.transpose(1, 2).reshape(B * L, self.count, D).transpose(0, 1)

    def vectors(self) -> list[nn.Parameter]:
        """Return the parameters that hold one vector per expert, and therefore look like a matrix."""
        return [self.get_parameter(own) for own in self._vectors]

    def extra_repr(self) -> str:
        """Return how many experts there are."""
        return f"{self.count} experts, {self.num_heads} heads each"

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for expert in range(self.count):
            for name in self._names:
                part = self.get_parameter(_own(name)).select(_expert_axis(name), expert)
                whole = part.flatten(0, 1) if name.startswith("qkv") else part
                destination[f"{prefix}{expert}.{name}"] = whole if keep_vars else whole.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: list[str],
    ) -> None:
        """Stack the tensors of ``state_dict`` (a copy); where one is missing, take the present value."""
        now: dict[str, Any] = {}
        self._save_to_state_dict(now, prefix, keep_vars=False)
        absent = [key for key in now if key not in state_dict]
        for name in self._names:
            keys = [f"{prefix}{expert}.{name}" for expert in range(self.count)]
            if any(key in state_dict for key in keys):
                parts = [state_dict.pop(key, now[key]) for key in keys]
                state_dict[prefix + _own(name)] = _stacked(name, parts)
        before = len(missing_keys)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        missing_keys[before:] = absent  # by the names that a checkpoint has


def _own(name: str) -> str:
    """Return the name of the stacked parameter for a parameter of a block: qkv.weight → qkv_weight."""
    return name.replace(".", "_")


def _expert_axis(name: str) -> int:
    return 1 if name.startswith("qkv") else 0


def _stacked(name: str, parts: Sequence[Tensor]) -> Tensor:
    """Return a parameter of all experts in one tensor; the axis of q, k and v precedes that of experts."""
    if name.startswith("qkv"):
        parts = [part.unflatten(0, (3, -1)) for part in parts]
    return torch.stack(list(parts), _expert_axis(name))


def _folded(weight: Tensor, bias: Tensor, gain_ED: Tensor, shift_ED: Tensor) -> tuple[Tensor, Tensor]:
    """Return weight and bias of W(g·x + s) + b as a map of x: W·g and W s + b.

    W (..., E, out, D), b (..., E, out). ``W s`` is written without a matrix product, so that both forms of
    the experts have the same FLOPs.
    """
    return weight * gain_ED[:, None], bias + (weight * shift_ED[:, None]).sum(-1)


def _mapped(x_ENK: Tensor, weight_EOK: Tensor, bias_EO: Tensor) -> Tensor:
    """Return each expert's linear map of its own input: (E, N, out)."""
    dtype = x_ENK.dtype
    return torch.bmm(x_ENK, weight_EOK.to(dtype).mT).add_(bias_EO.to(dtype)[:, None])
