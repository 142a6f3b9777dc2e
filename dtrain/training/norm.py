"""The norm of a gradient that may lie in parts on many ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.utils import get_total_norm

from dtrain.checkpoint.plan import in_first_copy, local_part


def local_parts(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What this rank has of each."""
    return [local_part(tensor) for tensor in tensors]


def divided(parts: list[torch.Tensor], factor: float, *, spread: bool) -> bool:
    """Multiply gradients by a number, in place. :returns: whether all that comes out is finite, on all ranks.

    All ranks must reach it.

    :param spread: whether each rank has another part of them.
    """
    bad = torch.zeros(1, dtype=torch.float32, device=parts[0].device)
    if all(part.dtype == torch.float32 and part.device == bad.device for part in parts):
        # One pass, made for GradScaler. It takes the factor in float32, in which these are multiplied anyway.
        torch._amp_foreach_non_finite_check_and_unscale_(parts, bad, torch.full_like(bad, factor))
    else:
        torch._foreach_mul_(parts, factor)
        wide = [torch.promote_types(part.dtype, torch.float32) for part in parts]
        finite = [torch.isfinite(part.sum(dtype=d)).to(bad.device) for part, d in zip(parts, wide, strict=True)]
        bad += 1.0 - torch.stack(finite).all().float()
    if spread:
        dist.all_reduce(bad)
    return float(bad) == 0


def total_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all of them together. All ranks must reach it.

    :returns: a scalar.
    """
    if not gradients:
        return torch.zeros(())
    by_mesh: dict[object, list[torch.Tensor]] = {}
    for gradient in gradients:
        by_mesh.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    norms = [get_total_norm(same) for same in by_mesh.values()]
    whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return whole[0] if len(whole) == 1 else torch.linalg.vector_norm(torch.stack(whole))


def exact_norm(gradients: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same, with the same bits however the gradients are cut and spread. All ranks must reach it.

    The squares are rounded to multiples of one power of two for each tensor, and added up as integers, whose sums have
    no rounding (the idea of pre-rounding: Demmel and Nguyen, "Fast Reproducible Floating-Point Summation", 2013).
    Of n elements, a square may be off by n * 2^-63 of the largest of that tensor.

    :returns: a scalar in float64.
    """
    if not gradients:
        return torch.zeros(())
    parts = local_parts(gradients)
    device = parts[0].device
    largest = torch.stack([_largest(part) for part in parts])
    # Where all ranks hold the same, each can tell by itself.
    spread = any(isinstance(gradient, DTensor) for gradient in gradients)
    if spread:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    if not torch.isfinite(largest).all():
        return torch.full((), torch.nan, dtype=torch.float64, device=device)
    exponents = torch.frexp(largest).exponent.tolist()
    # A tensor's squares, as integers, add up to less than 2^62.
    counts = [gradient.numel() * (1 + gradient.is_complex()) for gradient in gradients]
    bits = [62 - max(1, count).bit_length() for count in counts]
    sums = torch.zeros(len(parts), dtype=torch.int64, device=device)
    for number, (gradient, part, exponent, room) in enumerate(zip(gradients, parts, exponents, bits, strict=True)):
        if part.numel() and (not spread or _first_copy(gradient)):
            # In two factors: a power of two that is out of float32's range may still scale what is in it.
            low, high = -exponent // 2, -exponent - -exponent // 2
            real = torch.view_as_real(part.resolve_conj()) if part.is_complex() else part
            scaled = real.float().mul(2.0**low).mul_(2.0**high)
            sums[number] = scaled.square_().mul_(2.0**room).round_().to(torch.int64).sum()
    if spread:
        dist.all_reduce(sums)
    scales = [2.0 ** (2 * exponent - room) for exponent, room in zip(exponents, bits, strict=True)]
    squares = sums.double() * torch.tensor(scales, dtype=torch.float64, device=device)
    return squares.sum().sqrt()


def _largest(part: torch.Tensor) -> torch.Tensor:
    if part.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=part.device)
    largest: torch.Tensor = torch.linalg.vector_norm(part, torch.inf).float()
    return largest.nan_to_num(torch.inf, torch.inf)  # not every backend's maximum lets a NaN through


def _first_copy(gradient: torch.Tensor) -> bool:
    """Whether no rank before this one has the same part."""
    if not isinstance(gradient, DTensor):
        return dist.get_rank() == 0
    mesh = gradient.device_mesh
    place = mesh.get_coordinate()
    assert place is not None
    return in_first_copy(mesh) and all(
        at == 0 for at, kind in zip(place, gradient.placements, strict=True) if isinstance(kind, Replicate)
    )
