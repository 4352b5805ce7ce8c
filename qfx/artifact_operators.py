"""The operators that a saved graph may call: a closed list, by qualified name.

All compute tensors from tensors, sizes and numbers. None reads or writes a file, starts a process, calls Python that a
graph brings along, reads memory that nobody filled, or has a number of results that depends on data. In-place twins
(``relu_``) write to their first argument and to nothing else.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload

import qfx.ops  # noqa: F401  which defines qfx's operators
from qfx.operators import OPS

_KNOWN = frozenset(OPS) - {"getitem"}

_ELEMENTWISE = """
    absolute neg negative positive sign sgn signbit square ceil floor round trunc fix frac exp2 expm1 log2 log10 log1p
    tan asin acos atan sinh cosh asinh acosh atanh arcsin arccos arctan erfc erfinv lgamma digamma logit sinc deg2rad
    rad2deg isnan isinf isfinite isposinf isneginf logical_not bitwise_not selu celu prelu rrelu softplus log_sigmoid
    hardshrink softshrink threshold glu nan_to_num divide true_divide floor_divide remainder fmod multiply subtract
    maximum minimum fmax fmin clip atan2 arctan2 hypot copysign xlogy logaddexp logaddexp2 heaviside eq ne lt le gt ge
    not_equal less less_equal greater greater_equal logical_and logical_or logical_xor bitwise_and bitwise_or
    bitwise_xor bitwise_left_shift bitwise_right_shift __and__ __or__ __xor__ __lshift__ __rshift__ where lerp addcmul
    addcdiv isclose float_power real imag conj _conj resolve_conj resolve_neg view_as_real view_as_complex complex polar
    angle native_dropout dropout feature_dropout alpha_dropout special_expit special_erf special_logit special_log1p
    special_expm1 special_exp2 special_xlogy
"""
_REDUCTIONS = """
    prod amax amin max min argmax argmin aminmax any all std_mean logsumexp cumprod cummax cummin logcumsumexp median
    nanmedian nansum nanmean quantile nanquantile count_nonzero topk sort argsort kthvalue mode linalg_norm
    linalg_matrix_norm cosine_similarity pairwise_distance dist trace _safe_softmax _log_softmax
"""
_PRODUCTS = """
    mm mv dot vdot inner outer ger addmm addbmm addmv addr baddbmm einsum tensordot bilinear _trilinear kron cross
    linalg_cross linalg_matmul linalg_multi_dot chain_matmul cdist _cdist_forward convolution conv_tbc
    _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_attention_math
    _transformer_encoder_layer_fwd _native_multi_head_attention _weight_norm _weight_norm_interface
"""
_MOVES = """
    reshape_as view_as view_copy expand_as expand_copy broadcast_to swapaxes swapdims moveaxis adjoint mT mH
    matrix_H numpy_T ravel tile repeat_interleave unfold tril triu diag diagonal diag_embed diagflat rot90 fliplr flipud
    concat concatenate hstack vstack dstack column_stack row_stack unsafe_chunk unsafe_split unsafe_split_with_sizes
    tensor_split hsplit vsplit dsplit block_diag meshgrid broadcast_tensors atleast_1d atleast_2d atleast_3d
    t_copy transpose_copy permute_copy squeeze_copy unsqueeze_copy slice_copy select_copy alias_copy detach_copy
    diff index gather take take_along_dim masked_fill scatter scatter_add scatter_reduce index_add index_copy index_fill
    index_put masked_scatter select_scatter slice_scatter diagonal_scatter bucketize searchsorted isin
    im2col col2im reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d
    replication_pad3d _pad_circular _pad_enum native_channel_shuffle max_pool1d_with_indices max_pool2d_with_indices
    max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d _adaptive_avg_pool2d
    _adaptive_avg_pool3d upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d
    _upsample_nearest_exact2d _upsample_nearest_exact3d _upsample_bilinear2d_aa _upsample_bicubic2d_aa
    grid_sampler_2d grid_sampler_3d affine_grid_generator copy lift lift_fresh lift_fresh_copy
"""
_NORMS_AND_LOSSES = """
    _fused_rms_norm native_batch_norm nll_loss2d nll_loss_forward nll_loss2d_forward
    poisson_nll_loss soft_margin_loss hinge_embedding_loss margin_ranking_loss triplet_margin_loss
    cosine_embedding_loss multi_margin_loss multilabel_margin_loss
"""
_MAKERS = """
    arange zeros ones full zeros_like ones_like full_like new_zeros new_ones new_full eye linspace logspace
    tril_indices triu_indices scalar_tensor rand randn randint randperm rand_like randn_like randint_like bernoulli
    normal multinomial hann_window hamming_window blackman_window bartlett_window
"""
_FOURIER = """
    fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_fftn fft_ifftn
    fft_rfftn fft_irfftn fft_fftshift fft_ifftshift fft_fftfreq fft_rfftfreq stft istft
"""
_SIZES = "sym_size sym_numel"
_ONLY_IN_PLACE = "copy_ fill_ zero_"
_RESULTS = ("Tensor", "List[Tensor]")

ATEN = _KNOWN.union(
    *(
        names.split()
        for names in (_ELEMENTWISE, _REDUCTIONS, _PRODUCTS, _MOVES, _NORMS_AND_LOSSES, _MAKERS, _FOURIER, _SIZES)
    )
)
QFX = frozenset({"quantize", "dequantize", "choose_qparams", "unpack"})

PYTHON: dict[str, Callable[..., Any]] = {
    "operator::getitem": operator.getitem,
    **{
        f"operator::{f.__name__}": f
        for f in (
            *(operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod),
            *(operator.neg, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge),
        )
    },
    **{
        f"torch::{f.__name__}": f
        for f in (torch.sym_max, torch.sym_min, torch.sym_int, torch.sym_float, torch.sym_not, torch.sym_ite)
    },
}
"""What computes sizes, and picks one of several results; no power: its result has any number of digits."""

_NAMES: dict[Any, str] = {function: name for name, function in PYTHON.items()}


def operator_named(name: str) -> Callable[..., Any] | None:
    """The operator of that qualified name (``aten::add.Tensor``, ``aten::relu``), or None: it is not on the list."""
    return PYTHON.get(name) or _overload(name)


def name_of_operator(target: Any) -> str | None:
    """The qualified name of an operator on the list, else None."""
    if isinstance(target, OpOverload):
        name = target.name()
        return name if _overload(name) is target else None
    return _NAMES.get(target)


@cache
def _overload(name: str) -> OpOverload | None:
    namespace, _, rest = name.partition("::")
    base, _, overload = rest.partition(".")
    listed = QFX if namespace == "qfx" else ATEN if namespace == "aten" else frozenset()
    if base not in listed and not (namespace == "aten" and (base in _ONLY_IN_PLACE.split() or _twin(base) in listed)):
        return None
    packet = getattr(getattr(torch.ops, namespace), base, None)
    if packet is None or (overload or "default") not in packet.overloads():
        return None
    found: OpOverload = getattr(packet, overload or "default")
    if base not in _SIZES.split() and not all(str(r.type) in _RESULTS for r in found._schema.returns):
        return None  # one of TorchScript's own, which computes Python's numbers, strings and lists
    written = [i for i, a in enumerate(found._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    return found if written == ([0] if base.endswith("_") and not base.endswith("__") else []) else None


def _twin(base: str) -> str:
    """The operator that does out of place what ``base`` does in place; empty for others."""
    return base[:-1] if base.endswith("_") and not base.startswith("__") else ""
