"""Training and evaluation of the miniature: its teachers, evaluators, the demo, and the tables of all variants.

Needs the extra `train`.
"""
