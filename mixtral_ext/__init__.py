"""mixtral_ext: kernels of the Mistral/Mixtral family, as torch ops and numpy functions over one C library.

The ops are functions of this module (see ops.py) and torch ops `torch.ops.mixtral_ext.*`. `reference` has the same ops
in plain torch, `debug` checks index values on any device. Without torch, `mixtral_ext.numpy` works and nothing else.
"""
from importlib.util import find_spec

__version__ = "0.1.0"

__all__ = ["apply_rope", "debug", "grouped_gemm", "grouped_gemm_swiglu", "moe_combine", "moe_experts", "moe_gate", "moe_permute",
           "moe_sort", "reference", "rolling_attention", "sliding_window_attention"]

if find_spec("torch"):
    from . import debug, reference
    from .ops import (apply_rope, grouped_gemm, grouped_gemm_swiglu, moe_combine, moe_experts, moe_gate, moe_permute,
                      moe_sort, rolling_attention, sliding_window_attention)
else:
    def __getattr__(name):
        if name in __all__:
            raise ImportError(f"mixtral_ext.{name} needs torch, and this Python has no torch: install torch 2.11 or newer "
                              "(for a CPU: pip install torch==2.13.0), or use the ops of mixtral_ext.numpy")
        raise AttributeError(f"module 'mixtral_ext' has no attribute '{name}'")
