"""GPT-2 from scratch, in its four sizes, on OpenWebText: B 512, T 1024 (0.5M tokens a step).

    python -m jaxlm.main --config=configs/gpt2.py:124m

Choose data.micro_batches so that a part fits the device. Not yet run to its end here: no figure to expect. nanoGPT's
README reports a validation loss of about 2.85 for 124M on OpenWebText after 300B tokens, which is these 600,000 steps.

arg: 124m, 350m, 774m or 1.5b.
"""

from jaxlm import config
from jaxlm.errors import ConfigError, nearest

SIZES = {  # layers, heads, width, peak learning rate (Brown et al. 2020, table 2.1, for the nearest size)
    "124m": (12, 12, 768, 6e-4),
    "350m": (24, 16, 1024, 3e-4),
    "774m": (36, 20, 1280, 2.5e-4),
    "1.5b": (48, 25, 1600, 2e-4),
}


def get_config(arg: str = ""):
    size = arg or "124m"
    if size not in SIZES:
        raise ConfigError(f"configs/gpt2.py has no size {arg!r}: {nearest(size, SIZES)}")
    layers, heads, width, peak = SIZES[size]
    c = config.default()
    c.steps = 600_000
    c.model.update(num_layers=layers, num_heads=heads, embed_dim=width, context_length=1024)
    c.model.update(vocab_size=50257, dtype="bfloat16")
    c.data.source = "hf://Skylion007/openwebtext"
    c.data.tokenizer = "gpt2"
    c.data.validation = "0.05%"
    c.data.batch_size = 512
    c.data.micro_batches = 32
    c.optimizer.add_decayed_weights = {"weight_decay": 0.1, "where": "kernel$|embedding$"}
    c.optimizer.scale_by_learning_rate = {"peak": peak, "schedule": "warmup_cosine", "warmup": 2000.0, "final": 0.1}
    c.eval.update(every=1000, batches=20)
    c.checkpoint.every = 1000
    return c
