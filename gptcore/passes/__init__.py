"""Optimization passes: frozen values that turn a model into a cheaper one, one file a pass.

Nothing here imports torch at import time; a pass imports it inside ``apply``.
"""
