"""A small GPT-2 on the Python standard library's own source, by bytes: the first run on a new machine.

python -m jaxlm.main --config=configs/quickstart.py --workdir=runs/quickstart
"""

from jaxlm import config


def get_config(arg: str = ""):
    c = config.default()
    c.steps = 400
    c.model.unroll = True  # a quarter faster on two cores than the rolled loop
    c.eval.every = 100
    c.checkpoint.every = 200
    return c
