"""How qfx's operators are said in ONNX: the table that torch's exporter is given.

Each function is traced: it gets ONNX values for tensors and plain Python values for the rest, and builds nodes by
calling ``onnxscript``'s operators. Opset 21 has all that is needed: scales per block, and 4-bit integers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qfx import ops
from qfx.affine import MIN_SCALE

TOKEN = -1
"""The group size that means the whole axis: scales that are found at run time, one a token."""


def translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator → function, for ``torch.onnx.export(custom_translation_table=...)``; needs ``onnxscript``."""
    from onnx import TensorProto
    from onnxscript import opset21 as op

    def real(x: Any) -> Any:
        return x if x.dtype == TensorProto.FLOAT else op.Cast(x, to=TensorProto.FLOAT)

    def of_type(x: Any, dtype: int) -> Any:
        return x if x.dtype == dtype else op.Cast(x, to=dtype)

    def layout(axis: int | None, group_size: int | None) -> dict[str, int]:
        if axis is None:
            return {}
        return {"axis": axis} if group_size is None else {"axis": axis, "block_size": group_size}

    def quantize(
        x: Any,
        scale: Any,
        zero_point: Any,
        axis: int | None,
        group_size: int | None,
        quant_min: int,
        quant_max: int,
        dtype: int,
        channels_last: bool = False,
    ) -> Any:
        if group_size == TOKEN:
            inverse = op.Div(op.Constant(value_float=1.0), scale)  # as qfx does: x / scale rounds otherwise
            q = op.Add(op.Round(op.Mul(real(x), inverse)), real(zero_point))
            return op.Cast(op.Clip(q, op.Constant(value_float=quant_min), op.Constant(value_float=quant_max)), to=dtype)
        return op.QuantizeLinear(real(x), scale, of_type(zero_point, dtype), **layout(axis, group_size))

    def dequantize(
        q: Any, scale: Any, zero_point: Any, axis: int | None, group_size: int | None, dtype: int
    ) -> Any:
        if group_size == TOKEN:
            x = op.Mul(op.Sub(real(q), real(zero_point)), scale)
        elif q.dtype == TensorProto.INT32:  # ONNX has no zero point there
            x = op.DequantizeLinear(q, scale, **layout(axis, group_size))
        else:
            x = op.DequantizeLinear(q, scale, of_type(zero_point, q.dtype), **layout(axis, group_size))
        return of_type(x, dtype)

    def choose_qparams(
        x: Any, axis: int | None, group_size: int | None, symmetric: bool, quant_min: int, quant_max: int
    ) -> Any:
        axes = () if axis is None else (op.Constant(value_ints=[axis]),)
        keep = int(axis is not None)
        zero = op.Constant(value_float=0.0)
        low = op.Min(op.ReduceMin(real(x), *axes, keepdims=keep), zero)
        high = op.Max(op.ReduceMax(real(x), *axes, keepdims=keep), zero)
        half = op.Constant(value_float=(quant_max - quant_min) / 2)
        least = op.Constant(value_float=MIN_SCALE)
        if symmetric:
            scale = op.Max(op.Div(op.Max(op.Neg(low), high), half), least)
            middle = op.Constant(value_int=(quant_min + quant_max + 1) // 2)
            zero_point = op.Cast(op.Expand(middle, op.Shape(scale)), to=TensorProto.INT32)
            return scale, zero_point
        two = op.Constant(value_float=2.0)
        scale = op.Max(op.Div(op.Sub(op.Div(high, two), op.Div(low, two)), half), least)
        offset = op.Sub(op.Constant(value_float=quant_min), op.Round(op.Div(low, scale)))
        bounds = (op.Constant(value_float=quant_min), op.Constant(value_float=quant_max))
        return scale, op.Cast(op.Clip(offset, *bounds), to=TensorProto.INT32)

    return {ops.quantize: quantize, ops.dequantize: dequantize, ops.choose_qparams: choose_qparams}
