"""Optimizers as data. A spec is a config's `optimizer` section: a chain of names, and a table of arguments each.

spec = optim.replace(spec, "scale_by_adam", "scale_by_lion", b1=0.9)
transform = optim.build(spec, None, steps=1000)  # an Optax chain
"""

from jaxlm.optim.chain import build
from jaxlm.optim.edits import (
    diff,
    drop,
    from_json,
    insert_after,
    insert_before,
    replace,
    to_json,
    with_args,
)
from jaxlm.optim.review import check, leave_one_out
from jaxlm.optim.ways import explain

__all__ = [
    "build",
    "check",
    "diff",
    "drop",
    "explain",
    "from_json",
    "insert_after",
    "insert_before",
    "leave_one_out",
    "replace",
    "to_json",
    "with_args",
]
