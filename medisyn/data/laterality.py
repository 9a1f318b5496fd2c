"""Whether a caption, a label or a column states a side of the body; such an image is never mirrored.

states_side("fundus photography, OD")  # True
"""

import re
from typing import Any

SIDE_COLUMNS = ("laterality", "eye_side", "side", "extra.laterality")
_IN_TEXT = re.compile(r"\b((?i:left|right)|O[DS]|[LR])\b")  # OD and OS are the right and the left eye
_IS_A_SIDE = re.compile(r"left|right|o[ds]|[lr]", re.IGNORECASE)
_NO_SIDE = frozenset(("", "none", "null", "nan", "n/a", "na", "unknown", "not stated"))


def states_side(caption: str | None) -> bool:
    """Whether a caption has a word for a side."""
    return bool(caption and _IN_TEXT.search(caption))


def is_side(value: Any) -> bool:
    """Whether the value of some column is a side and nothing else."""
    return bool(_IS_A_SIDE.fullmatch(str(value).strip()))


def has_side(value: Any) -> bool:
    """Whether a laterality column states a side; a code that is not known here (1, "sin.") is taken for one."""
    return str(value).strip().lower() not in _NO_SIDE
