"""Data: text in, token files, batch n. `open(cfg.data)` gives the tokenizer and the splits, `training` the batches."""

from jaxlm.data.batches import Batch, Batches, Windows, evaluation, prefetch
from jaxlm.data.examples import HeldOut, held_out, training
from jaxlm.data.forms import Document
from jaxlm.data.sources import Source, open_source
from jaxlm.data.store import Data, open, tokenize
from jaxlm.data.tokenfile import TokenFile, open_tokens, tokenizer_of, verify, write_tokens
from jaxlm.data.tokenizers import Tokenizer

__all__ = [
    "Batch",
    "Batches",
    "Data",
    "Document",
    "HeldOut",
    "Source",
    "TokenFile",
    "Tokenizer",
    "Windows",
    "evaluation",
    "held_out",
    "open",
    "open_source",
    "open_tokens",
    "prefetch",
    "tokenize",
    "tokenizer_of",
    "training",
    "verify",
    "write_tokens",
]
