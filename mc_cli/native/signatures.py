"""The parameters of the compiled routines, as native/mc.h declares them; a test compares the two.

Every argument is given by its name: two numbers that change places in a call would be a silent mistake, a name that a
routine does not have is a TypeError.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

# type in C -> type of ctypes; pointers are addresses, whatever lies there
_TYPES = {"int": ctypes.c_int, "float": ctypes.c_float, "uint64_t": ctypes.c_uint64}

_KEPT = {
    "index": "const int64_t *",
    "weights": "const float *",
    "threshold": "float",
    "tokens": "int",
    "k": "int",
    "absent": "int",
    "renormalise": "int",
    "kept_index": "int64_t *",
    "kept_weights": "float *",
}

# routine -> parameter -> its type in C, in the order of the declaration
SIGNATURES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "mc_native_version": {},
        "mc_layout": {"numbers": "int32_t *"},
        "mc_use_team": {"start": "void *"},
        "mc_best_path": {},
        "mc_product": {
            "bank": "const mc_bank *",
            "x": "const void *",
            "experts": "const int64_t *",
            "bfloat16": "int",
            "tokens": "int",
            "top_k": "int",
            "activation_bytes": "int",
            "path": "int",
            "threads": "int",
            "out": "void *",
        },
        "mc_experts": {
            "up": "const mc_bank *",
            "down": "const mc_bank *",
            "x": "const void *",
            "experts": "const int64_t *",
            "weights": "const void *",
            "bfloat16": "int",
            "tokens": "int",
            "top_k": "int",
            "activation": "int",
            "activation_bytes": "int",
            "path": "int",
            "threads": "int",
            "out": "void *",
        },
        "mc_affine_matrix": {
            "codes": "const uint8_t *",
            "scales": "const uint16_t *",
            "zero_points": "const uint8_t *",
            "bits": "int",
            "rows": "int",
            "inputs": "int",
            "group": "int",
            "path": "int",
            "threads": "int",
            "floats": "float *",
            "bfloat16s": "uint16_t *",
        },
        "mc_trellis_matrix": {
            "codes": "const uint8_t *",
            "scales": "const uint16_t *",
            "tables": "const uint8_t *",
            "unit": "float",
            "inputs": "int",
            "outputs": "int",
            "length": "int",
            "planes": "int",
            "path": "int",
            "threads": "int",
            "out": "float *",
        },
        "mc_trellis_encode": {
            "targets": "const float *",
            "factor": "const float *",
            "scales": "const float *",
            "members": "const int64_t *",
            "weights": "const float *",
            "feedback": "const float *",
            "values": "const float *",
            "factors": "int",
            "batch": "int",
            "first": "int",
            "count": "int",
            "inputs": "int",
            "outputs": "int",
            "groups": "int",
            "rings": "int",
            "length": "int",
            "numerator": "int",
            "denominator": "int",
            "levels": "const float *",
            "places": "const uint8_t *",
            "level_count": "int",
            "path": "int",
            "threads": "int",
            "codes": "uint8_t *",
            "decoded": "float *",
            "errors": "float *",
        },
        "mc_draw_errors": {
            "targets": "const float *",
            "factor": "const float *",
            "scales": "const float *",
            "kept": "const float *",
            "size": "const float *",
            "seed": "int",
            "factors": "int",
            "batch": "int",
            "first": "int",
            "count": "int",
            "inputs": "int",
            "outputs": "int",
            "threads": "int",
            "values": "float *",
            "errors": "float *",
        },
        "mc_keep_by_share": {
            "hidden": "const float *",
            "received": "const float *",
            "uniform": "float",
            "protect_at": "float",
            "features": "int",
            **_KEPT,
        },
        "mc_keep_halves": {"margin": "float", **_KEPT},
        "mc_keep_by_router": {
            "hidden": "const float *",
            "router": "const float *",
            "bias": "const float *",
            "least_share": "float",
            "features": "int",
            **_KEPT,
        },
        "mc_share_slots": {
            "table": "const int64_t *",
            "index": "const int64_t *",
            "weights": "const void *",
            "bfloat16": "int",
            "tokens": "int",
            "k": "int",
            "absent": "int",
            "shared_index": "int64_t *",
            "shared_weights": "void *",
        },
        "mc_lattice_search": {
            "points": "const float *",
            "metric": "const float *",
            "wanted": "const float *",
            "linear": "const float *",
            "scales": "const float *",
            "rules": "const uint8_t *",
            "count": "int",
            "length": "int",
            "rows": "int",
            "codes": "int16_t *",
            "signs": "uint8_t *",
        },
    }
)

# routine -> what it returns, in C
RETURNS = MappingProxyType({**dict.fromkeys(SIGNATURES, "int"), "mc_native_version": "uint64_t"})


def bound(compiled: ctypes.CDLL, name: str) -> Any:
    """A routine of the library as a Python function whose parameters are those of the table, by name alone.

    A missing or unknown name is a TypeError, a value of another type a ctypes.ArgumentError.
    """
    parameters = SIGNATURES[name]
    prototype = ctypes.CFUNCTYPE(_ctype(RETURNS[name]), *map(_ctype, parameters.values()))
    names = ", ".join(parameters)
    # written out, as ctypes' own way of naming arguments and `**` both take longer than the rest of a call
    source = f"lambda{' *, ' + names if names else ''}: routine({names})"
    return eval(source, {"routine": prototype((name, compiled))})


def _ctype(declared: str) -> Any:
    return ctypes.c_void_p if declared.endswith("*") else _TYPES[declared]
