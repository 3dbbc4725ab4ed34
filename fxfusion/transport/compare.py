"""Ground costs of one layer: features of units, brought to one scale, and their distances.

Whatever the features are, weights or activations over samples, all metrics follow from inner products
between the units of both parents and their squared lengths. So features add up and are never stored.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence

import torch

from fxfusion.statistics import CrossMoments
from fxfusion.transport.options import Costs, Metric, Normalisation, Scaling

_TINY = torch.finfo(torch.float64).tiny
_SCALES: dict[Normalisation, Callable[[torch.Tensor], torch.Tensor]] = {
    Normalisation.MAX: torch.max,
    Normalisation.MEAN: torch.mean,
    Normalisation.MEDIAN: torch.median,
}


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Inner products of the features of units.

    Attributes
    ----------
    cross : torch.Tensor
        ``[batch, target, source]``, float64.
    target, source : torch.Tensor
        ``[batch, target]`` and ``[batch, source]``: squared lengths.
    """

    cross: torch.Tensor
    target: torch.Tensor
    source: torch.Tensor

    def __add__(self, other: Comparison) -> Comparison:
        """Compare by the features of both."""
        return Comparison(self.cross + other.cross, self.target + other.target, self.source + other.source)

    @property
    def masses(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Length of every unit's features, of target and source: ``[batch, units]``, summing to one.

        None is zero, so that every unit is transported.
        """
        lengths = [side.sqrt() for side in (self.target, self.source)]
        lengths = [side.clamp_min(1e-6 * float(side.max()) or 1.0) for side in lengths]
        return lengths[0] / lengths[0].sum(-1, keepdim=True), lengths[1] / lengths[1].sum(-1, keepdim=True)

    @classmethod
    def of_features(cls, target: torch.Tensor, source: torch.Tensor, scaling: Scaling | str) -> Comparison:
        """Compare explicit features.

        Parameters
        ----------
        target, source : torch.Tensor
            ``[batch, units, features]``.
        scaling : Scaling
            Unit length is left to :func:`compare`.

        Examples
        --------
        >>> unit = torch.eye(2)[None]
        >>> Comparison.of_features(unit, unit, Scaling.RAW).cross
        tensor([[[1., 0.],
                 [0., 1.]]], dtype=torch.float64)
        """
        left, right = (_scaled(side.double(), Scaling(scaling)) for side in (target, source))
        return cls(torch.matmul(left, right.mT), left.square().sum(-1), right.square().sum(-1))

    @classmethod
    def of_moments(
        cls, moments: CrossMoments, scaling: Scaling | str, components: int | None = None
    ) -> Comparison:
        """Compare activations by their moments over samples, which are the features.

        Standardised activations have the unbiased variance of one, as in the published code.

        Parameters
        ----------
        moments : CrossMoments
            With the target's own covariance if there are ``components``.
        scaling : Scaling
        components : int, optional
            How many of the target's principal components over samples (of its centred activations) are the
            features.
        """
        if components is not None:
            return cls._of_components(moments, Scaling(scaling), components)
        scaling = Scaling(scaling)
        cross, target, source = moments.cross, moments.square_target, moments.square_source
        if scaling in (Scaling.RAW, Scaling.UNIT):
            means = moments.mean_target.unsqueeze(-1) * moments.mean_source.unsqueeze(-2)
            cross = cross + moments.count * means
            target = target + moments.count * moments.mean_target.square()
            source = source + moments.count * moments.mean_source.square()
        if scaling is Scaling.STANDARDISED:
            length = moments.count - 1.0
            product = target.unsqueeze(-1).sqrt() * source.unsqueeze(-2).sqrt()
            cross = torch.where(product > 0, cross / product.clamp_min(_TINY), 0.0) * length
            target, source = (target > 0) * length, (source > 0) * length
        return cls(cross, target, source)

    @classmethod
    def _of_components(cls, moments: CrossMoments, scaling: Scaling, count: int) -> Comparison:
        """Project centred activations X (target) and Y onto the leading left singular vectors of X.

        With ``X = U S V'`` (samples x units) the projections are ``U' X = S V'`` and, for the source,
        ``U' Y = S^-1 V' X' Y``: second moments are all that is needed.
        """
        assert moments.own is not None
        own, cross = moments.own, moments.cross
        if scaling is Scaling.STANDARDISED:
            length = max(moments.count - 1.0, 1.0)
            left, right = (
                (length**0.5 / square.sqrt().clamp_min(_TINY)).where(square > 0, torch.zeros_like(square))
                for square in (moments.square_target, moments.square_source)
            )
            own = own * left.unsqueeze(-1) * left.unsqueeze(-2)
            cross = cross * left.unsqueeze(-1) * right.unsqueeze(-2)
        values, vectors = torch.linalg.eigh(own)  # ascending
        values, vectors = values[..., -count:], vectors[..., -count:]
        known = values > 1e-12 * values[..., -1:].clamp_min(_TINY)  # directions in which anything varies
        roots = values.clamp_min(_TINY).sqrt()
        target = torch.where(known.unsqueeze(-1), roots.unsqueeze(-1) * vectors.mT, 0.0)
        source = torch.where(known.unsqueeze(-1), torch.matmul(vectors.mT, cross) / roots.unsqueeze(-1), 0.0)
        return cls(torch.matmul(target.mT, source), target.square().sum(-2), source.square().sum(-2))


def _scaled(features: torch.Tensor, scaling: Scaling) -> torch.Tensor:
    if scaling in (Scaling.CENTRED, Scaling.STANDARDISED):
        features = features - features.mean(-1, keepdim=True)
    if scaling is Scaling.STANDARDISED:
        deviation = features.square().sum(-1, keepdim=True) / max(features.shape[-1] - 1, 1)
        return features / deviation.sqrt().clamp_min(_TINY)
    return features


def compare(parts: Sequence[Comparison], scaling: Scaling | str) -> Comparison:
    """Return the comparison by the features of all parts, brought to unit length together if asked for.

    Examples
    --------
    >>> unit = torch.eye(2)[None]
    >>> part = Comparison.of_features(unit, 3 * unit, Scaling.UNIT)
    >>> compare([part, part], Scaling.UNIT).cross
    tensor([[[1., 0.],
             [0., 1.]]], dtype=torch.float64)
    """
    total = functools.reduce(operator.add, parts)
    if Scaling(scaling) is not Scaling.UNIT:
        return total
    length = total.target.sqrt().unsqueeze(-1) * total.source.sqrt().unsqueeze(-2)
    cross = torch.where(length > 0, total.cross / length.clamp_min(_TINY), 0.0)
    return Comparison(cross, (total.target > 0).double(), (total.source > 0).double())


def ground_cost(comparison: Comparison, options: Costs) -> torch.Tensor:
    """Return the cost of pairing each unit of the target with each of the source.

    Parameters
    ----------
    comparison : Comparison
    options : Costs

    Returns
    -------
    torch.Tensor
        float64 ``[batch, target, source]``, not negative.

    Examples
    --------
    >>> unit = torch.eye(2)[None]
    >>> ground_cost(Comparison.of_features(unit, 2 * unit, Scaling.RAW), Costs(normalisation="none"))
    tensor([[[1., 5.],
             [5., 1.]]], dtype=torch.float64)
    """
    target, source = comparison.target.unsqueeze(-1), comparison.source.unsqueeze(-2)
    if options.metric is Metric.COSINE:
        length = target.sqrt() * source.sqrt()
        cost = 1.0 - torch.where(length > 0, comparison.cross / length.clamp_min(_TINY), 0.0)
    else:
        cost = target + source - 2.0 * comparison.cross
    cost = cost.clamp_min(0.0)
    if options.metric is Metric.EUCLIDEAN:
        cost = cost.sqrt()
    if options.normalisation is Normalisation.LOG:
        cost = torch.log1p(cost)
    elif options.normalisation is not Normalisation.NONE:
        scale = _SCALES[Normalisation(options.normalisation)](cost)
        cost = cost / scale if scale > 0 else cost
    return cost if options.clip is None else cost.clamp(*options.clip)
