"""The model of the studies in experiments/: small enough that dozens of runs take minutes on two CPU cores.

    python -m jaxlm.main --config=configs/ablation.py --workdir=runs/ablation

128,768 parameters on the bytes of the Python standard library's source, 307,200 tokens a run.
"""

from jaxlm import config


def get_config(arg: str = ""):
    c = config.default()
    c.steps = 300
    c.steps_per_call = 10
    c.model.update(num_layers=2, num_heads=4, embed_dim=64, context_length=64)
    c.data.batch_size = 16
    c.optimizer.scale_by_learning_rate.update(peak=1e-2, warmup=0.1, final=0.0)
    c.eval.update(every=100, batches=40)
    c.checkpoint.update(every=300, keep=1, best="")
    c.log.update(every=50, writers=("jsonl",))
    return c
