"""How fast jaxlm is, beside what else one would use: see README.md.

python -m experiments.bench [--suite step data startup ...] [--quick] [--out DIR]
"""
