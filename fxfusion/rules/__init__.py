"""Operator rules, one file per family; importing the package registers them all.

=============  ========================================================================
file           operators
=============  ========================================================================
pointwise      element-wise operators: axes align on the right and unify
view           what only rearranges: views, permutations, slices, concatenations
contract       linear, matmul and their kin, in einsum notation
conv           convolutions, grouped or not, pooling
reduce         symmetric reductions and softmax: blind to the order along an axis
norm           layer, group, batch, instance and RMS normalisation
attention      scaled dot-product attention
index          embedding, gather, index; what gives positions a meaning
patch          tensors of which a part is replaced, and diagonals
windows        windows, samples and resampling of images
fourier        Fourier transforms, complex numbers
recurrent      LSTM, GRU and plain recurrences, layer by layer or step by step
experts        top-k, sorting, counting, scattering and grouped products: mixtures of experts
create         new tensors that read only another one's metadata
=============  ========================================================================
"""

from fxfusion.rules import (  # noqa: F401
    attention,
    contract,
    conv,
    create,
    experts,
    fourier,
    index,
    norm,
    patch,
    pointwise,
    recurrent,
    reduce,
    view,
    windows,
)
from fxfusion.rules.context import Context, Typed
from fxfusion.rules.registry import RULES, find_rule, operator_name, rule

__all__ = ["RULES", "Context", "Typed", "find_rule", "operator_name", "rule"]
