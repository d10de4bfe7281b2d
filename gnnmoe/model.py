"""The language model: embeddings, layers of experts and one coupler each, and a tied head.

Shapes: B batch, L length, D width, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from gnnmoe.config import GNNMoEConfig, Refused, unknown_name
from gnnmoe.couplers.registry import build_coupler
from gnnmoe.experts import BatchedExperts, ExpertBlock, ExpertLoop, init_weights
from gnnmoe.head import IGNORED, PADDED_BIAS, TiedHead
from gnnmoe.seeds import RandomStreams

EXPERTS, PRECISIONS = ("loop", "batched"), ("fp32", "tf32", "bf16")


class GNNMoELayer(nn.Module):
    """All experts on every token, one coupler, one residual: ``x + coupler(experts(x), x)``.

    Experts and coupler draw from streams of their own. ``experts``: ``loop``, one after the other, or
    ``batched``, all at once; both give the same numbers.
    """

    def __init__(
        self, config: GNNMoEConfig, streams: RandomStreams | None = None, *, experts: str = "loop"
    ) -> None:
        super().__init__()
        streams = streams or RandomStreams(int(torch.randint(2**31, ())))
        with streams("init.coupler"):
            coupler = build_coupler(config)
        count, ffn_dim = coupler.expert_shape()
        with streams("init.experts"):
            blocks = [ExpertBlock(config, ffn_dim) for _ in range(count)]
            for block in blocks:
                block.initialize(config.initialization)
        self.experts = BatchedExperts(blocks) if experts == "batched" else ExpertLoop(blocks)
        self.coupler = coupler

    def expert_outputs(self, x_BLD: Tensor) -> Tensor:
        """Return the output of each expert for ``x`` (B, L, D): (B, L, E, D), a view of (E, B, L, D)."""
        return self.experts(x_BLD)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return (B, L, D) for an input of the same shape."""
        return self.forward_with_auxiliary(x_BLD)[0]

    def forward_with_auxiliary(self, x_BLD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return (B, L, D) and, in train mode, the coupler's auxiliary losses by name."""
        expert_outputs_BLED = self.expert_outputs(x_BLD)
        auxiliary = self.coupler.auxiliary_losses(expert_outputs_BLED, x_BLD) if self.training else {}
        return x_BLD + self.coupler(expert_outputs_BLED, x_BLD), auxiliary

    def flops(self, batch: int, length: int) -> int | None:
        """Return the FLOPs of a forward, or None where the coupler has no formula for its own."""
        own = self.coupler.flops(batch * length)
        if own is None:
            return None
        count, ffn_dim = self.coupler.expert_shape()
        return own + count * ExpertBlock.flops(self.coupler.config, batch, length, ffn_dim)


class GNNMoEModel(nn.Module):
    """A causal language model whose layers run E experts on every token and couple them.

    Trunk, experts and coupler are drawn from the named streams ``init.trunk``, ``init.experts`` and
    ``init.coupler`` of ``seed``: models that differ only in their coupler start from the same trunk and
    experts. Without a seed, the seed is drawn from torch's global generator.

    ``experts``: ``loop``, one block after the other, or ``batched``, all in a few large products. Both give
    the same numbers and the same state dict. ``precision``: ``bf16`` computes ``forward`` and
    ``token_nll`` under autocast; parameters, residual stream, loss and its softmax stay in float32.
    ``fp32`` and ``tf32`` are the same here, since TF32 is a setting of the whole process
    (``torch.set_float32_matmul_precision``).

    Raises:
        Refused: ``experts`` or ``precision`` is unknown, or the config asks for what cannot be built.
    """

    layers: Sequence[GNNMoELayer]

    def __init__(
        self,
        config: GNNMoEConfig,
        seed: int | None = None,
        *,
        experts: str = "loop",
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        for kind, name, allowed in (("experts", experts, EXPERTS), ("precision", precision, PRECISIONS)):
            if name not in allowed:
                raise Refused(unknown_name(kind, name, allowed))
        self.config, self.precision = config, precision
        streams = RandomStreams(int(torch.randint(2**31, ())) if seed is None else seed)
        with streams("init.trunk"):
            self.token_embedding = nn.Embedding(config.padded_vocab_size, config.embed_dim)
            self.position_embedding = nn.Embedding(config.max_seq_length, config.embed_dim)
            self.output_norm = nn.LayerNorm(config.embed_dim)
            self.apply(init_weights)
        self.dropout = nn.Dropout(config.dropout_rate)
        layers = [GNNMoELayer(config, streams, experts=experts) for _ in range(config.num_layers)]
        self.layers = nn.ModuleList(layers)  # pyright: ignore[reportAttributeAccessIssue]
        self.head = TiedHead(config.vocab_size, config.padded_vocab_size)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        targets: Tensor | None = None,
        return_logits: bool = True,
    ) -> dict[str, Tensor | None]:
        """Return ``loss`` (mean nll in nats), ``logits`` (B, L, vocab_size), ``auxiliary_loss``.

        Args:
            input_ids: int64 (B, L), L at most ``max_seq_length``.
            attention_mask: (B, L), 1 for tokens and 0 for padding, which must be on the right;
                targets that are padding are not scored.
            labels: (B, L), the ids at the same positions as ``input_ids``, shifted in here.
            targets: (B, L), already shifted: ``targets[:, t]`` follows ``input_ids[:, t]``.
            return_logits: if False, ``logits`` is None and the full logits are never held in memory.

        ``loss`` is None without labels or targets; −100 is not scored. ``auxiliary_loss`` is the
        sum of the couplers' own losses (0 for most, and in eval mode), never part of ``loss``.

        Raises:
            ValueError: labels together with targets, a mask with padding elsewhere than on the
                right, or sequences longer than ``max_seq_length``.
        """
        targets = _shifted_targets(attention_mask, labels, targets)
        with self.autocast(input_ids.device):
            hidden_BLD, auxiliary = self._hidden(self.embed(input_ids))
            embedding = self.token_embedding.weight
            loss = None
            if targets is not None:
                loss = self.head.loss(hidden_BLD.flatten(0, 1), embedding, targets.flatten())
            logits = self.head.logits(hidden_BLD, embedding) if return_logits else None
        return {"loss": loss, "logits": logits, "auxiliary_loss": auxiliary}

    @torch.no_grad()
    def token_nll(self, input_ids: Tensor, targets: Tensor) -> Tensor:
        """Return the nll (B, L) in nats of each target, 0 where it is −100; no gradient."""
        with self.autocast(input_ids.device):
            return self.nll_from(self.embed(input_ids), 0, targets)

    @torch.no_grad()
    def nll_from(self, x_BLD: Tensor, layer: int, targets: Tensor) -> Tensor:
        """Return ``token_nll`` (B, L) of the model from layer number ``layer`` on, whose input is ``x``."""
        with self.autocast(x_BLD.device):
            hidden_BLD, _ = self._hidden(x_BLD, layer)
            embedding = self.token_embedding.weight
            nll_N = self.head.token_nll(hidden_BLD.flatten(0, 1), embedding, targets.flatten())
        return nll_N.view(targets.shape)

    def autocast(self, device: torch.device) -> AbstractContextManager[object]:
        """Return the autocast of bf16. With another precision the caller's own context stays in force."""
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bf16" else nullcontext()

    def _hidden(self, x_BLD: Tensor, first_layer: int = 0) -> tuple[Tensor, Tensor]:
        auxiliary = x_BLD.new_zeros(())
        for layer in self.layers[first_layer:]:
            x_BLD, losses = layer.forward_with_auxiliary(x_BLD)
            for value in losses.values():
                auxiliary = auxiliary + value
        return self.output_norm(x_BLD), auxiliary

    def embed(self, input_ids: Tensor) -> Tensor:
        """Return the input of the first layer (B, L, D).

        Raises:
            ValueError: the sequences are longer than ``max_seq_length``.
        """
        L = input_ids.shape[1]
        if self.config.max_seq_length < L:
            raise ValueError(f"input_ids has length {L}; max_seq_length is {self.config.max_seq_length}.")
        positions_LD = self.position_embedding.weight[:L]
        return self.dropout(self.token_embedding(input_ids) + positions_LD)

    @torch.no_grad()
    def set_output_bias(self, log_probabilities: Tensor) -> None:
        """Start the head's bias at ``log_probabilities`` (vocab_size,), such as those of the unigram.

        Words past the end of a shorter tensor start with probability 0.
        """
        self.head.bias.fill_(PADDED_BIAS)
        self.head.bias[: len(log_probabilities)] = log_probabilities

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile ``forward`` with these arguments of ``torch.compile``. A copy of the model is not compiled.

        ``nn.Module.compile`` would also compile the model's hooks, and again for each new hook.
        """
        self.__dict__.pop("forward", None)
        self.forward = torch.compile(self.forward, *args, **kwargs)

    @property
    def is_compiled(self) -> bool:
        """Whether ``compile`` was called."""
        return "forward" in self.__dict__

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the compiled forward: in a copy, it would still use the parameters of this model."""
        return {name: value for name, value in super().__getstate__().items() if name != "forward"}

    def matrices(self) -> list[nn.Parameter]:
        """Return the parameters that weight decay acts on: matrices, but no biases and no gains."""
        stacked = [module.vectors() for module in self.modules() if isinstance(module, BatchedExperts)]
        vectors = {id(parameter) for vectors in stacked for parameter in vectors}
        return [p for p in self.parameters() if p.ndim >= 2 and id(p) not in vectors]

    def parameter_counts(self) -> dict[str, int]:
        """Return the number of parameters by part: total, expert, coupler, other."""
        counts = {"expert": 0, "coupler": 0}
        for layer in self.layers:
            counts["expert"] += sum(p.numel() for p in layer.experts.parameters())
            counts["coupler"] += sum(p.numel() for p in layer.coupler.parameters())
        total = sum(p.numel() for p in self.parameters())
        return {"total": total, **counts, "other": total - sum(counts.values())}

    def flops(self, batch: int, length: int) -> int | None:
        """Return the FLOPs of a forward with logits: 2 per multiply-add of a matrix product.

        None where a coupler has no formula; ``torch.utils.flop_counter`` then counts them.
        """
        total = 2 * batch * length * self.config.embed_dim * self.config.vocab_size
        for layer in self.layers:
            flops = layer.flops(batch, length)
            if flops is None:
                return None
            total += flops
        return total

    @torch.no_grad()
    def analyze_expert_communication(self, input_ids: Tensor | None = None) -> dict[str, dict[str, Tensor]]:
        """Return each layer's ``communication`` as ``{"layer_0": {...}, …}``.

        With ``input_ids`` (B, L), also the parts that depend on the content, averaged over these tokens.
        """
        x_BLD = None if input_ids is None else self.embed(input_ids)
        found = {}
        for number, layer in enumerate(self.layers):
            outputs = None if x_BLD is None else layer.expert_outputs(x_BLD)
            found[f"layer_{number}"] = layer.coupler.communication(outputs, x_BLD)
            if x_BLD is not None and outputs is not None:
                x_BLD = x_BLD + layer.coupler(outputs, x_BLD)
        return found


def _shifted_targets(
    attention_mask: Tensor | None, labels: Tensor | None, targets: Tensor | None
) -> Tensor | None:
    if labels is not None and targets is not None:
        raise ValueError("give labels (shifted by the model) or targets (shifted already), not both.")
    if attention_mask is not None:
        kept = attention_mask.bool()
        if bool((kept[:, 1:] & ~kept[:, :-1]).any()):
            raise ValueError(
                "attention_mask has padding before a token; only padding on the right is supported."
            )
        if labels is not None:
            labels = labels.masked_fill(~kept, IGNORED)
        if targets is not None:
            targets = targets.masked_fill(~kept, IGNORED)
    if labels is None:
        return targets
    return torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], dim=1)
