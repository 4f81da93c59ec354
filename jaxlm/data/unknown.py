"""Text that a tokenizer does not know, and replaces by one token for all of it.

Such a token is easily predicted and stands for any number of bytes, so there are no bits per byte of a text with one.
"""

from __future__ import annotations

import numpy as np

from jaxlm.data import mapped
from jaxlm.data.store import Data
from jaxlm.data.tokenfile import TokenFile
from jaxlm.data.tokenizers import Tokenizer

_CHUNK = 2**24  # tokens looked at together


def share(tokenizer: Tokenizer, file: TokenFile) -> float:
    """Of a file's tokens, those that stand for unknown text. Reads the file only where there may be some."""
    if tokenizer.unknown is None:
        return 0.0
    parts = (file.tokens[first : first + _CHUNK] for first in range(0, file.num_tokens, _CHUNK))
    number = sum(int(np.count_nonzero(part == tokenizer.unknown)) for part in parts)
    mapped.check_unchanged(file.tokens)
    return number / file.num_tokens


def warning(data: Data) -> str:
    """What is to be said of the text of a run; "" where all of it is known."""
    files = {"training": data.train} | ({"held-out": data.validation} if data.validation else {})
    shares = {name: share(data.tokenizer, file) for name, file in files.items()}
    if not any(shares.values()):
        return ""
    found = " and ".join(f"{100 * of:.2g}% of the {name} tokens" for name, of in shares.items() if of)
    missing = "; there is no eval/bits_per_byte" if shares.get("held-out") else ""
    return f"warning: the tokenizer does not know all of the text: {found} stand for what it replaces by one{missing}"
