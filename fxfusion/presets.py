"""Settings by name: what published code does, for those who want to compare with it."""

from __future__ import annotations

from typing import Any

from fxfusion.transport.options import (
    Costs,
    Flow,
    Heads,
    Magnitudes,
    Metric,
    Normalisation,
    QueryKey,
    Scaling,
    Tables,
)

# The authors' optima for soft couplings: of weights and of activations.
REGULARISATION = {"weights": 0.06, "activations": 0.08}


def reference(
    features: str = "activations", coupling: str = "soft", residual: str = "mean", query_key: str = "separate"
) -> dict[str, Any]:
    """Return the arguments of :func:`fxfusion.fuse` that do what the paper's published code does.

    It transports queries and keys separately and pays no heed to heads, so that an aligned parent no
    longer computes what it did: our defaults are better. Where the assignment of a class token alone is
    not unique (its units differ in one number), another of the best ones may come out.

    Parameters
    ----------
    features : {"activations", "weights"}
        Activations are those of linear layers, standardised; calibration data must be given to ``fuse``.
    coupling : {"soft", "hard"}
    residual : str
        A value of :class:`fxfusion.Residual`. The published code calls ``skip`` only_resid, ``branch``
        no_resid and ``identity`` resid_as_identity.
    query_key : {"separate", "shared", "joint"}
        ``shared`` is its eq_t_map. Of ``joint`` ones it compares keys' activations where it moves queries,
        and the other way round: that is not done here.

    Returns
    -------
    dict
        ``features``, ``coupling`` and ``flow``.

    References
    ----------
    Imfeld et al., Transformer Fusion with Optimal Transport, ICLR 2024, arXiv 2310.05719; its code is
    github.com/graldij/transformer-fusion.

    Examples
    --------
    >>> import torch, fxfusion
    >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> x = torch.randn(16, 4)
    >>> result = fxfusion.fuse([make(), make()], (x,), calibration=[x], **reference())
    >>> result.module(x).shape
    torch.Size([16, 2])
    """
    observed = features == "activations"
    costs = Costs(
        metric=Metric.EUCLIDEAN,
        activations=Scaling.STANDARDISED,
        weights=Scaling.RAW if observed else Scaling.UNIT,
        normalisation=Normalisation.MAX,
    )
    flow = Flow(
        residual=residual,
        magnitudes=Magnitudes.LAYERS,
        query_key=QueryKey(query_key),
        heads=Heads.IGNORED,
        tables=Tables.OWN,
        costs=costs,
        regularisation=REGULARISATION.get(features) if coupling == "soft" else None,
    )
    return {"features": features, "coupling": coupling, "flow": flow}
