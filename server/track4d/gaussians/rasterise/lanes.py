"""Sixteen float32 numbers at once: a vector type for Numba kernels.

LLVM turns a loop into vector code only when the loop has one of the shapes that it recognises, and keeps sums over the rows of
a picture in memory even then. Here the vectors are named: `x = lane_numbers() + dx` is one instruction with AVX-512, two with
AVX, four with NEON, whatever stands around it. `+ - * /`, `<`, `<=`, `>` and `>=` work between vectors and with float32
numbers; the arithmetic is free to be reordered and fused, as with Numba's fastmath.
"""

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import extending, types
from numba.core import cgutils
from numba.extending import models, overload, register_model

from .kernels import helper

LANES = 16

intrinsic: Any = extending.intrinsic  # its type hints would have callers pass the typing context

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_FAST = ("fast",)


class _Floats(types.Type):
    """The Numba type of 16 float32."""


class _Mask(types.Type):
    """The Numba type of 16 booleans."""


floats, mask = _Floats("floats16"), _Mask("mask16")


@register_model(_Floats)
class _FloatsModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type) -> None:
        super().__init__(manager, numba_type, _FLOATS)


@register_model(_Mask)
class _MaskModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type) -> None:
        super().__init__(manager, numba_type, ir.VectorType(ir.IntType(1), LANES))


def _vector(builder, numba_type, value):
    """The LLVM vector of an argument that is a vector or a float32."""
    if numba_type == floats:
        return value
    first = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), value, _INT(0))
    return builder.shuffle_vector(first, first, ir.Constant(_INTS, [0] * LANES))


def _operation(build: Callable, result: types.Type) -> Callable:
    """An intrinsic of two arguments, at least one of them a vector, from what it builds of two LLVM vectors."""
    @intrinsic
    def operation(typing_context, a, b):
        if floats not in (a, b) or not {a, b} <= {floats, types.float32}:
            return None

        def codegen(context, builder, signature, arguments):
            return build(builder, *(_vector(builder, t, x) for t, x in zip(signature.args, arguments)))
        return result(a, b), codegen
    return operation


def _overload(symbol: Callable, operation: Callable) -> None:
    def choose(a, b):
        return (lambda a, b: operation(a, b)) if floats in (a, b) else None
    overload(symbol)(choose)


for _symbol, _name in ((operator.add, "fadd"), (operator.sub, "fsub"), (operator.mul, "fmul"), (operator.truediv, "fdiv")):
    _overload(_symbol, _operation(lambda builder, a, b, name=_name: getattr(builder, name)(a, b, flags=_FAST), floats))
for _symbol, _name in ((operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">=")):
    _overload(_symbol, _operation(lambda builder, a, b, name=_name: builder.fcmp_ordered(name, a, b, flags=_FAST), mask))


def _pick(sign: str) -> Callable:
    return lambda builder, a, b: builder.select(builder.fcmp_ordered(sign, a, b, flags=_FAST), a, b)


smaller, larger = _operation(_pick("<"), floats), _operation(_pick(">"), floats)


@intrinsic
def where(typing_context, chosen, a, b):
    """`a` where the mask is set, `b` elsewhere; both may be float32."""
    def codegen(context, builder, signature, arguments):
        _, a, b = (_vector(builder, t, x) if t != mask else x for t, x in zip(signature.args, arguments))
        return builder.select(arguments[0], a, b)
    return floats(chosen, a, b), codegen


@intrinsic
def lane_numbers(typing_context):
    """0, 1, ... 15."""
    def codegen(context, builder, signature, arguments):
        return ir.Constant(_FLOATS, [float(k) for k in range(LANES)])
    return floats(), codegen


@intrinsic
def zeros(typing_context):
    """A vector of zeros, to start a sum with."""
    def codegen(context, builder, signature, arguments):
        return ir.Constant(_FLOATS, [0.0] * LANES)
    return floats(), codegen


def _pointer(context, builder, array_type, array, start):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [start]), _FLOATS.as_pointer())


@intrinsic
def load(typing_context, array, start):
    """Entries start .. start + 15 of a contiguous 1-D float32 array; nothing checks that they exist."""
    if array.layout != "C":
        return None

    def codegen(context, builder, signature, arguments):
        return builder.load(_pointer(context, builder, signature.args[0], *arguments), align=4)
    return floats(array, types.intp), codegen


@intrinsic
def store(typing_context, array, start, value):
    """The opposite of `load`."""
    if array.layout != "C":
        return None

    def codegen(context, builder, signature, arguments):
        builder.store(arguments[2], _pointer(context, builder, signature.args[0], *arguments[:2]), align=4)
        return context.get_dummy_value()
    return types.void(array, types.intp, floats), codegen


@intrinsic
def _nearest_integer(typing_context, x):
    """The integer that a float not above 0 rounds to, as a float; and 2 to that power, as what to add to a float's bits."""
    def codegen(context, builder, signature, arguments):
        half = ir.Constant(_FLOATS, [-0.5] * LANES)
        whole = builder.fptosi(builder.fadd(arguments[0], half, flags=_FAST), _INTS)
        return context.make_tuple(builder, signature.return_type, [
            builder.sitofp(whole, _FLOATS),
            builder.bitcast(builder.shl(whole, ir.Constant(_INTS, [23] * LANES)), _FLOATS)])
    return types.UniTuple(floats, 2)(x), codegen


@intrinsic
def _add_bits(typing_context, a, b):
    """The floats whose 32 bits are the sum of those of `a` and `b`."""
    def codegen(context, builder, signature, arguments):
        return builder.bitcast(builder.add(*(builder.bitcast(x, _INTS) for x in arguments)), _FLOATS)
    return floats(a, b), codegen


@helper
def exp2(x):
    """2^x for -126 < x <= 0, to 4e-7; anything below that range. A polynomial on [-1/2, 1/2], its exponent bits shifted."""
    whole, power = _nearest_integer(x)
    rest = x - whole
    p = rest * types.float32(1.3333558e-3) + types.float32(9.6181291e-3)
    p = p * rest + types.float32(5.5504109e-2)
    p = p * rest + types.float32(2.4022651e-1)
    p = p * rest + types.float32(6.9314718e-1)
    p = p * rest + types.float32(1.0)
    return _add_bits(p, power)


def _folded(builder, vectors: list, places: tuple[list[int], list[int]]) -> list:
    """Each two neighbours shuffled and added into one; the last one with zeros if their number is odd."""
    padded = vectors + [ir.Constant(_FLOATS, [0.0] * LANES)] * (len(vectors) % 2)
    return [builder.fadd(*(builder.shuffle_vector(a, b, ir.Constant(_INTS, half)) for half in places), flags=_FAST)
            for a, b in zip(padded[::2], padded[1::2])]


# Places (those of the second vector start at 16) of the two halves that are added when two vectors become one. The first two
# rounds stay within groups of four lanes and the last two move whole groups: both are cheap in every instruction set.
_FOLDS = (
    ([4 * g + k for g in range(4) for k in (0, 16, 1, 17)], [4 * g + k for g in range(4) for k in (2, 18, 3, 19)]),
    ([4 * g + k for g in range(4) for k in (0, 1, 16, 17)], [4 * g + k for g in range(4) for k in (2, 3, 18, 19)]),
    *[([4 * g + k for g in (0, 2, 4, 6) for k in range(4)], [4 * g + k for g in (1, 3, 5, 7) for k in range(4)])] * 2,
)


@intrinsic
def sums(typing_context, vectors):
    """The sums over the lanes of each vector in a tuple of up to 16, as the lanes of one vector; the others are 0."""
    def codegen(context, builder, signature, arguments):
        folded = cgutils.unpack_tuple(builder, arguments[0], len(vectors))
        for places in _FOLDS:
            folded = _folded(builder, folded, places)
        return folded[0]
    return floats(vectors), codegen
