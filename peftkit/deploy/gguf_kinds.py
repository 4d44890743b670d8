"""How a GGUF file can hold its matrices; and Q4_K_M, the mixture of K-quants, quantized by llama.cpp's own code.

The `gguf` library writes all the others, and only reads K-quants. `ggml_quantize_chunk` writes them; it is in the
shared library of xllamacpp, and a public function of ggml.h whose arguments are plain numbers and pointers.
"""

from __future__ import annotations

import ctypes
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

KINDS = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q4_k_m")
SUPERBLOCK = 256
"""Weights that share one scale of scales; a row must be a multiple of it."""


def mixed_type(name: str, width: int, *, blocks: int, tied: bool) -> Any:
    """GGML's type of a matrix in Q4_K_M: 6 bits for the head and for half of v and of the down projections, else 4.

    A fused q, k and v gets 5. Rows that are no multiple of a superblock fall back on Q8_0, Q5_1 and Q5_0, and those
    that are none of 32 either on F16.
    """
    import gguf

    types = gguf.GGMLQuantizationType
    head = name == "output.weight" or (tied and name == "token_embd.weight")
    block = int(name.split(".")[1]) if name.startswith("blk.") else -1
    wide = head or (block >= 0 and _more_bits(block, blocks) and ("attn_v." in name or "ffn_down." in name))
    fused = "attn_qkv." in name
    if width % SUPERBLOCK == 0:
        return types.Q6_K if wide else types.Q5_K if fused else types.Q4_K
    if width % 32 == 0:
        return types.Q8_0 if wide else types.Q5_1 if fused else types.Q5_0
    return types.F16


def _more_bits(block: int, blocks: int) -> bool:
    """llama.cpp's choice of layers: the first and last eighth, and every third between."""
    eighth = blocks // 8
    return block < eighth or block >= 7 * blocks // 8 or (block - eighth) % 3 == 2


def ggml_quantize(values: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
    """The rows of a float32 matrix in a K-quant, as bytes."""
    import gguf
    import numpy as np

    rows, width = values.shape
    shape = gguf.quant_shape_to_byte_shape(values.shape, kind)
    out = np.empty(shape, dtype=np.uint8)
    written = _library().ggml_quantize_chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, rows, width, None)
    assert written == out.nbytes, f"ggml wrote {written} bytes of {out.nbytes}"
    return out


@cache
def _library() -> Any:
    """llama.cpp's shared library, which is known to be installed."""
    library = ctypes.CDLL(str(import_module("xllamacpp.xllamacpp").__file__))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
    return library
