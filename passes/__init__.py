"""The compiler's passes, one per file, in pipeline order.

==============================  ==========================================================
:mod:`~fxfusion.passes.normalize`         drop what carries no computation (guards, metadata assertions)
:mod:`~fxfusion.passes.propagate`         infer the space of every axis; attach the plan
:mod:`~fxfusion.passes.pair`              give every parent its graph and plan, and pair their spaces
:mod:`~fxfusion.passes.fold_norms`        let spaces turn: norm weights go into what reads them
:mod:`~fxfusion.passes.balance`           choose factors of units and bases of heads alike in all parents
:mod:`~fxfusion.passes.align`             solve one transport per space and parent
:mod:`~fxfusion.passes.align_flow`        or one per layer and parent, carried along the network
:mod:`~fxfusion.passes.apply_transports`  carry the transports through every parameter
:mod:`~fxfusion.passes.refine`            learn further transports on unlabelled data
:mod:`~fxfusion.passes.restore`           give all parents the target's own factors
:mod:`~fxfusion.passes.merge`             average the aligned parents into the graph's parameters
:mod:`~fxfusion.passes.repair`            correct statistics of batch normalisations, and of units
==============================  ==========================================================

Each subclasses :class:`torch.fx.passes.infra.pass_base.PassBase` (through
:class:`~fxfusion.passes.base.FusionPass`), takes its options as dataclass fields and runs alone or in
torch's own ``PassManager``. Only :mod:`fxfusion.pipeline` knows the order.
"""

if __name__ != "fxfusion.passes":
    raise ImportError("fxfusion's passes are imported as 'fxfusion.passes', not as a top-level package")
