"""``nn.MultiheadAttention``, whose projections share one parameter and whose batch comes second."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dpsyngen.privacy.rules.constants import DerivingTape
from dpsyngen.privacy.rules.linear import linear
from dpsyngen.privacy.rules.registry import RULES, UnsupportedLayer

_ARGUMENTS = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k"),
    *("bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask"),
    *("need_weights", "attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"),
    *("static_k", "static_v", "average_attn_weights", "is_causal"),
)


def _multi_head_attention(
    tape: DerivingTape, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    given = dict(zip(_ARGUMENTS, args, strict=False)) | kwargs
    for name in ("bias_k", "bias_v", "static_k", "static_v", "add_zero_attn"):
        if given.get(name) is not None and given[name] is not False:
            raise UnsupportedLayer(f"multi-head attention with {name} has no per-example rule: leave it out.")
    query, key, value = (given[n] for n in ("query", "key", "value"))
    if query.dim() != 3:
        raise UnsupportedLayer(
            f"multi-head attention got a query of shape {tuple(query.shape)}: give it a batch axis (batch_first=True "
            "and inputs [rows, positions, features])."
        )
    bias = given["in_proj_bias"]
    weights = _projections(tape, given)
    biases = (None, None, None) if bias is None else _thirds(tape, bias)
    heads = given["num_heads"]
    q, k, v = (
        linear(tape, x.transpose(0, 1), w, b).unflatten(2, (heads, -1)).transpose(1, 2)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    mask = _mask(given, q, k)
    dropout = given.get("dropout_p", 0.0) if given.get("training", True) else 0.0
    attention: Tensor | None = None
    if given.get("need_weights", True):
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        attention = torch.softmax(scores if mask is None else scores + mask, dim=-1)
        mixed = F.dropout(attention, dropout) @ v
        if given.get("average_attn_weights", True):
            attention = attention.mean(1)
    else:
        mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
    out = linear(tape, mixed.transpose(1, 2).flatten(2), given["out_proj_weight"], given["out_proj_bias"])
    return out.transpose(0, 1), attention


def _projections(tape: DerivingTape, given: dict[str, Any]) -> tuple[Tensor, ...]:
    if given.get("use_separate_proj_weight"):
        return tuple(given[f"{n}_proj_weight"] for n in "qkv")
    return _thirds(tape, given["in_proj_weight"])


def _thirds(tape: DerivingTape, value: Tensor) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = tape.derive(torch.chunk, (value, 3), {}) if tape.tracks(value) else value.chunk(3)
    return parts


def _mask(given: dict[str, Any], q: Tensor, k: Tensor) -> Tensor | None:
    """All masks as one that is added to the scores, [rows or 1, heads or 1, queries, keys]."""

    def additive(mask: Tensor) -> Tensor:
        if mask.dtype != torch.bool:
            return mask
        return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, -math.inf)

    out = None
    if given.get("attn_mask") is not None:
        out = additive(given["attn_mask"])
        out = out[None, None] if out.dim() == 2 else out.view(len(q), q.shape[1], *out.shape[1:])
    if given.get("key_padding_mask") is not None:
        padding = additive(given["key_padding_mask"])[:, None, None, :]
        out = padding if out is None else out + padding
    return out


RULES[F.multi_head_attention_forward] = _multi_head_attention  # type: ignore[assignment]
