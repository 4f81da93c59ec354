"""GPT-2. `build(cfg.model)` gives its pure functions, once the vocabulary and the context length are known."""

from jaxlm.model.gpt2 import build

__all__ = ["build"]
