"""What the operators of the dialect are: tables and readings, each once."""

from fxopt.operators.assertions import is_assertion
from fxopt.operators.casts import ALIASES, CASTS, COPIES, UNCHANGED
from fxopt.operators.convolutions import (
    CONVOLUTIONS,
    NAME_PADDED,
    NUMBER_PADDED,
    TRANSPOSED_CONVOLUTIONS,
)
from fxopt.operators.dropout import DROPOUT, DROPOUT_IN_PLACE, ZEROING_DROPOUT
from fxopt.operators.linears import (
    LINEAR_TARGETS,
    Linear,
    as_linear,
    reads_as_linear,
    refuse_shared_weight,
)
from fxopt.operators.pointwise import UNTAGGED_POINTWISE
from fxopt.operators.products import PRODUCT_TARGETS, why_no_linear
from fxopt.operators.views import (
    EXPANSIONS,
    PARTS,
    PERMUTATIONS,
    REGROUPINGS,
    RESHAPES,
    RESHAPES_BY_STRIDES,
    RESHAPES_LIKE,
    REVERSALS,
    SIZED_RESHAPES,
    SPLITS,
    SQUEEZES,
    SWAPS,
    VIEWS,
    WHOLE_VIEWS,
    permutation,
    permutation_of,
)
from fxopt.operators.windows import MAX_POOLINGS, WINDOWED

__all__ = [
    "ALIASES",
    "CASTS",
    "CONVOLUTIONS",
    "COPIES",
    "DROPOUT",
    "DROPOUT_IN_PLACE",
    "EXPANSIONS",
    "LINEAR_TARGETS",
    "MAX_POOLINGS",
    "NAME_PADDED",
    "NUMBER_PADDED",
    "PARTS",
    "PERMUTATIONS",
    "PRODUCT_TARGETS",
    "REGROUPINGS",
    "RESHAPES",
    "RESHAPES_BY_STRIDES",
    "RESHAPES_LIKE",
    "REVERSALS",
    "SIZED_RESHAPES",
    "SPLITS",
    "SQUEEZES",
    "SWAPS",
    "TRANSPOSED_CONVOLUTIONS",
    "UNCHANGED",
    "UNTAGGED_POINTWISE",
    "VIEWS",
    "WHOLE_VIEWS",
    "WINDOWED",
    "ZEROING_DROPOUT",
    "Linear",
    "as_linear",
    "is_assertion",
    "permutation",
    "permutation_of",
    "reads_as_linear",
    "refuse_shared_weight",
    "why_no_linear",
]
