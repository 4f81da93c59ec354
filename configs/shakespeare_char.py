"""nanoGPT's baby GPT: 10.7M parameters on a text of about a megabyte, by characters.

    python -m jaxlm.main --config=configs/shakespeare_char.py --config.data.source=input.txt
    python -m jaxlm.main --config=configs/shakespeare_char.py:cpu --config.data.source=input.txt

The text is tiny shakespeare (github.com/karpathy/char-rnn, data/tinyshakespeare/input.txt), which you bring. nanoGPT's
README reports a validation loss of 1.4697 for the recipe and 1.88 for the small one that `cpu` is. Not yet run here on
that text.

arg: "" for 6 layers, 6 heads, 384 wide, T 256, B 64, 5000 steps; "cpu" for 4/4/128, T 64, B 12, 2000 steps.
"""

from jaxlm import config
from jaxlm.errors import ConfigError, nearest


def get_config(arg: str = ""):
    c = config.default()
    c.data.source = "input.txt"
    c.data.tokenizer = "chars"
    c.data.validation = "10%"
    c.eval.every = 250
    c.checkpoint.every = 250
    c.optimizer.scale_by_adam = {"b1": 0.9, "b2": 0.99, "eps": 1e-8}
    c.optimizer.add_decayed_weights = {"weight_decay": 0.1, "where": "kernel$|embedding$"}  # nanoGPT: all matrices
    c.optimizer.scale_by_learning_rate = {"peak": 1e-3, "schedule": "warmup_cosine", "warmup": 100.0, "final": 0.1}
    if arg == "":
        c.steps = 5000
        c.model.update(num_layers=6, num_heads=6, embed_dim=384, context_length=256, dropout=0.2)
        c.data.batch_size = 64
        c.eval.batches = 200
    elif arg == "cpu":
        c.steps = 2000
        c.model.update(num_layers=4, num_heads=4, embed_dim=128, context_length=64, dropout=0.0)
        c.data.batch_size = 12
        c.eval.batches = 20
    else:
        raise ConfigError(f"configs/shakespeare_char.py takes no argument {arg!r}: {nearest(arg, ['cpu', ''])}")
    return c
