"""The structures that Python fills in for the compiled routines, as native/mc.h declares them; a test compares the two.

A field that is not given is 0 or null.
"""

from __future__ import annotations

import ctypes

TRELLIS, AFFINE = 0, 1  # kinds of a bank
ENTRIES_OF = {TRELLIS: "trellis", AFFINE: "affine"}  # the field of a bank that holds its entries


class Entry(ctypes.Structure):
    """Where one matrix lies, and its shape. Every field has 8 bytes, so that entries are rows of an int64 tensor."""

    def row(self) -> tuple[int, ...]:
        """The fields in order; zeros where none was given."""
        return tuple(getattr(self, field[0]) or 0 for field in self._fields_)


class TrellisEntry(Entry):
    """mc_trellis_entry; without planes, it is of a matrix that is not there."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("block", ctypes.c_int64),
        ("length", ctypes.c_int64),
        ("planes", ctypes.c_int64),
    )


class AffineEntry(Entry):
    """mc_affine_entry; without bits, it is of a matrix that is not there."""

    _fields_ = (
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("zero_points", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
        ("bits", ctypes.c_int64),
    )


class Bank(ctypes.Structure):
    """mc_bank: matrices of one kind, each of its own shape."""

    _fields_ = (
        ("trellis", ctypes.c_void_p),
        ("affine", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("signs", ctypes.c_void_p),
        ("unit", ctypes.c_float),
        ("kind", ctypes.c_int32),
        ("matrices", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("group", ctypes.c_int32),
    )


STRUCTURES = {"mc_trellis_entry": TrellisEntry, "mc_affine_entry": AffineEntry, "mc_bank": Bank}
