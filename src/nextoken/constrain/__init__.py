"""Texts under a rule: constraints, and sampling from the model's distribution given that the rule holds."""

from nextoken.constrain.constraint import Both, Constraint, Place

__all__ = ["Both", "Constraint", "Place"]
