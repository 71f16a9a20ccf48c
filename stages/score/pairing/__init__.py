"""Rejection sampling: scored answers in, chosen/rejected pairs or groups out, and one fate for every prompt.

``rules.py`` has the rules, one function each; ``choice.py`` what holds around every rule, from one prompt's answers to
its pairs; ``shard.py`` reads answers out of a shard's tables, and ``stage.py`` makes tables of the choice.
"""
