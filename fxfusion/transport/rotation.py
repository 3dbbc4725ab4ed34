"""Rotations: the orthogonal map that brings two sets of units closest, and random ones.

The orthogonal Procrustes problem: ``R = U V'`` for the singular value decomposition ``U S V'`` of the
cross-moments maximises their inner product (Schoenemann 1966). Where the mean of the units must stay
(layer normalisation), it is solved in an explicit basis of what is orthogonal to it: projected cross-moments
would have a null direction of which rounding decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def complement(size: int) -> torch.Tensor:
    """Return an orthonormal basis of what is orthogonal to the ones vector: ``[size, size - 1]``.

    Examples
    --------
    >>> bool((complement(3).sum(0).abs() < 1e-12).all())
    True
    """
    spanning = torch.eye(size, dtype=torch.float64)
    spanning[:, 0] = 1.0
    return torch.linalg.qr(spanning)[0][:, 1:]


def procrustes(cross: torch.Tensor, centred: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the orthogonal maps closest to cross-moments.

    Parameters
    ----------
    cross : torch.Tensor
        ``[..., target, source]``, square.
    centred : bool
        Whether the ones vector must stay what it is.

    Returns
    -------
    rotation, value
        float64 ``[..., target, source]``, and their inner products with ``cross``: ``[...]``.

    Examples
    --------
    >>> turned = torch.tensor([[0.0, -2.0], [3.0, 0.0]])
    >>> rotation, value = procrustes(turned)
    >>> rotation.round().int().tolist(), round(float(value), 6)
    ([[0, -1], [1, 0]], 5.0)
    """
    cross = cross.double()
    size = cross.shape[-1]
    if centred and size > 1:
        basis = complement(size).to(cross.device)
        inner, _ = procrustes(basis.mT @ cross @ basis)
        rotation = basis @ inner @ basis.mT + 1.0 / size
    else:
        left, _, right = torch.linalg.svd(cross)
        rotation = left @ right
    return rotation, (rotation * cross).sum((-2, -1))


def planar(cross: torch.Tensor, planes: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotations of pairs of dimensions closest to cross-moments.

    Of one pair, ``[[c, -s], [s, c]]`` with ``c`` and ``s`` as the sum of the diagonal of its cross-moments is
    to the difference across.

    Parameters
    ----------
    cross : torch.Tensor
        ``[..., n, n]``.
    planes : sequence of (int, int)
        The pairs.

    Returns
    -------
    rotation, value
        float64 ``[..., n, n]``, and their inner products with ``cross``: ``[...]``.

    Examples
    --------
    >>> rotation, value = planar(torch.tensor([[0.0, -3.0], [3.0, 0.0]]), [(0, 1)])
    >>> rotation.round().int().tolist(), float(value)
    ([[0, -1], [1, 0]], 6.0)
    """
    cross = cross.double()
    first, second = torch.tensor(planes, device=cross.device).T
    along = cross[..., first, first] + cross[..., second, second]
    across = cross[..., second, first] - cross[..., first, second]
    return turned(torch.atan2(across, along), planes, cross.shape[-1]), torch.hypot(along, across).sum(-1)


def turned(angles: torch.Tensor, planes: Sequence[tuple[int, int]], size: int) -> torch.Tensor:
    """Return rotations of pairs of dimensions by angles ``[..., pairs]``: ``[..., size, size]``.

    Examples
    --------
    >>> turned(torch.tensor([torch.pi / 2]), [(0, 2)], 3).round().int()
    tensor([[ 0,  0, -1],
            [ 0,  1,  0],
            [ 1,  0,  0]], dtype=torch.int32)
    """
    eye = torch.eye(size, dtype=angles.dtype, device=angles.device)
    return turn(eye.expand(*angles.shape[:-1], size, size), angles.unsqueeze(-2), planes).mT


def turn(x: torch.Tensor, angles: torch.Tensor, planes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """Turn pairs of dimensions of vectors ``[..., n]`` by angles ``[..., pairs]``.

    Examples
    --------
    >>> turn(torch.tensor([1.0, 2.0]), torch.tensor([torch.pi / 2]), [(0, 1)]).round()
    tensor([-2.,  1.])
    """
    first, second = torch.tensor(planes, device=angles.device).T
    cosine, sine = angles.cos(), angles.sin()
    result = x.clone()
    result[..., first] = cosine * x[..., first] - sine * x[..., second]
    result[..., second] = sine * x[..., first] + cosine * x[..., second]
    return result


def random_rotation(
    size: int, generator: torch.Generator, centred: bool = False, count: int = 1
) -> torch.Tensor:
    """Draw orthogonal maps, uniformly: ``[count, size, size]``.

    Parameters
    ----------
    size : int
    generator : torch.Generator
    centred : bool
        Whether the ones vector must stay what it is.
    count : int
    """
    drawn = torch.randn(count, size - centred, size - centred, generator=generator, dtype=torch.float64)
    inner, upper = torch.linalg.qr(drawn)
    inner = inner * torch.diagonal(upper, dim1=-2, dim2=-1).sign().unsqueeze(-2)
    if not centred:
        return inner
    basis = complement(size)
    return basis @ inner @ basis.mT + 1.0 / size
