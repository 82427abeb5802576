"""Planning: what a GPT of any size needs, by arithmetic alone. Imports no torch, touches no device.

``shapes`` (size), ``memory``, ``cards`` (accelerators), ``training``, ``speed``, ``capacity``, each
a file; ``assumptions`` is everything a person can set, ``report`` what they take away.
"""
