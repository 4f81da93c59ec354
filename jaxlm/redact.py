"""Takes secrets out of what is written down: configs, logs, model cards.

Nothing here raises, and applying it twice changes nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

REDACTED = "<redacted>"

# A name by its words: `api_key`, `hfToken`, `tokens`; not `tokenizer`, `tokens_per_step`, `key_dtype`.
_NAME = re.compile(
    r"(?:^|[^A-Za-z0-9]|(?<=[a-z0-9])(?=[A-Z]))"
    r"(?i:(?:secret|password|passwd|credential)s?(?![a-z])"
    r"|(?:(?:api|access|auth)?(?:key|token)s?|sig|signature)[\W\d_]*$)"
)
_VARIABLE = re.compile(
    r"(?i)(?:^|_)(?:TOKEN|(?:(?:API)?KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?)(?:_(?!(?:PATH|FILE|DIR)$)|$)"
)
_USER = re.compile(r'(?<=://)[^\s/?#"\\]+(?=@)')
_QUERY = re.compile(r"""(?<=[?&#])([\w.%-]+)=[^\s&#"'\\]+""")
_SHAPES = re.compile(
    r"((?i:key|token|secret|password|wandb|login)\W{1,6})[0-9a-f]{40}(?![0-9a-f])"  # Weights & Biases
    r"|(?<![A-Za-z0-9])(?:"
    r"hf_[A-Za-z0-9]{20,}"  # Hugging Face
    r"|sk-[\w-]{0,128}?[A-Za-z0-9]{16}[\w-]*"  # OpenAI, Anthropic
    r"|(?:AKIA|ASIA)[A-Z0-9]{16,}"  # AWS
    r"|gh[oprsu]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r")"
)


def text(s: str) -> str:
    """`s` with `<redacted>` for users and passwords in URLs, tokens in their queries, tokens that show by their shape,
    and the values of environment variables that are named like secrets, of 8 characters or more."""
    known = _known()
    while True:  # what is cut out may leave what now stands alone; each round has less to cut
        new = _QUERY.sub(_query, _USER.sub(REDACTED, s))
        for pattern in (_SHAPES, known):
            new = REDACTED.join(pattern.sub(rf"\1{REDACTED}", part) for part in new.split(REDACTED))
        if new == s:
            return s
        s = new


def fields(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings as dicts with all strings as `text` has them, and those under a name like a secret's redacted."""
    return _value(mapping, False)


def _value(value: Any, secret: bool) -> Any:
    if isinstance(value, str):
        return REDACTED if secret and value else text(value)
    if hasattr(type(value), "items"):  # a ConfigDict is no Mapping
        return {key: _value(item, secret or bool(_NAME.search(str(key)))) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_value(item, secret) for item in value)
    return value


def _query(match: re.Match[str]) -> str:
    return f"{match[1]}={REDACTED}" if _NAME.search(match[1]) else match[0]


def _known() -> re.Pattern[str]:
    values = {value.strip() for name, value in os.environ.items() if _VARIABLE.search(name)}
    longest_first = sorted((value for value in values if len(value) >= 8), key=len, reverse=True)
    return re.compile("()(?:" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
