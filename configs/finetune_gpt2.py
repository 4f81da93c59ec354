"""GPT-2 from the Hugging Face hub, trained on a text of yours: the classic recipe, for one GPU.

    python -m jaxlm.main --config=configs/finetune_gpt2.py --config.data.source=book.txt --config.steps=300
    python -m jaxlm.main --config=configs/finetune_gpt2.py:gpt2-medium --config.data.source=book.txt

AdamW at 1e-5 with a short warmup, decay on kernels, clipping at 1, dropout 0.1. A step is 16 sequences of 1024 tokens,
so three epochs of N tokens are 3 N / 16384 steps (a run's start line tells how many an epoch has); early stopping ends
a run whose loss on held-out text falls no more.

Without a network, from a folder that save_pretrained or jaxlm.export wrote; in float32 where there is no GPU:

    python -m jaxlm.main --config=configs/finetune_gpt2.py:path/to/folder --config.data.source=book.txt \
        --config.model.dtype=float32 --config.model.context_length=128 --config.data.batch_size=4

Not yet run here on OpenAI's weights: no figure to expect.

arg: a hub id, a folder, or a run directory; "" for gpt2.
"""

from jaxlm import config


def get_config(arg: str = ""):
    c = config.default()
    c.init_from = arg or "gpt2"
    c.steps = 500
    c.model.context_length = 0  # as many positions as the weights have
    c.model.update(dropout=0.1, dtype="bfloat16")
    c.data.update(batch_size=16, micro_batches=2)
    c.optimizer.clip_by_global_norm = {"max_norm": 1.0}
    c.optimizer.scale_by_adam = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
    c.optimizer.add_decayed_weights = {"weight_decay": 0.01, "where": "kernels"}
    c.optimizer.scale_by_learning_rate = {"peak": 1e-5, "schedule": "warmup_linear", "warmup": 0.05, "final": 0.0}
    c.eval.update(every=50, batches=50)
    c.checkpoint.every = 50
    c.early_stopping.patience = 3
    return c
