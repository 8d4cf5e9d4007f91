"""Lets a trace on the CPU follow the rules of a GPU's autocast.

PyTorch's autocast has a list of operations that it computes in float32 for each kind of device, and the CPU's is
another one: there LayerNorm, GroupNorm and softmax stay in half precision. On a GPU they do not, and what they keep for
the backward pass is twice as large. https://docs.pytorch.org/docs/stable/amp.html#autocast-op-reference; the list
itself is in PyTorch's `ATen/autocast_mode.h`, and a test holds these against it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

#: What a GPU's autocast computes from inputs cast to float32, by PyTorch's names (`AT_FORALL_FP32`).
FLOAT32 = frozenset({
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow", "softplus", "layer_norm", "native_layer_norm", "rms_norm", "group_norm", "frobenius_norm",
    "nuclear_norm", "cosine_similarity", "poisson_nll_loss", "cosine_embedding_loss", "nll_loss",
    "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss",
    "multilabel_margin_loss", "soft_margin_loss", "triplet_margin_loss", "multi_margin_loss",
    "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm", "logsumexp",
    # `upsample_...` by the name under which it is called, and the operator of `pow`.
    "interpolate", "__pow__", "__rpow__",
})  # fmt: skip
#: What it computes in half precision into float32, unless a dtype is given (`AT_FORALL_FP32_SET_OPT_DTYPE`, `norm`).
INTO_FLOAT32 = frozenset({
    "prod", "softmax", "log_softmax", "cumprod", "cumsum", "vector_norm", "matrix_norm", "sum", "norm",
})  # fmt: skip
_HALVES = (torch.float16, torch.bfloat16)


class AsOnGPU(TorchFunctionMode):
    """Within it the CPU's autocast also casts what a GPU's would, where the model calls it.

    It sees the calls of PyTorch that a model makes, and not those that these make in turn: of
    `nn.MultiheadAttention` the softmax inside stays as on the CPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.backward:
            # PyTorch leaves this mode for any call of its own, and checkpointing computes blocks again in the backward
            # pass. So its engine is called as `torch.autograd.backward` does, within this mode.
            with self:
                return torch.autograd.Variable._execution_engine.run_backward(
                    args, tuple(map(torch.ones_like, args)), False, False, (),
                    allow_unreachable=True, accumulate_grad=True,
                )  # fmt: skip
        name = getattr(func, "__name__", "").removeprefix("linalg_")
        if name in FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, _single, (args, kwargs))
        elif name in INTO_FLOAT32 and torch.is_autocast_enabled("cpu"):
            first = args[0] if args else None
            if isinstance(first, Tensor) and first.dtype in _HALVES and kwargs.get("dtype") is None:
                kwargs = {**kwargs, "dtype": torch.float32}
        return func(*args, **kwargs)


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALVES else tensor
