"""The process that owns a device and does one piece of work at a time.

``client`` is the server's side (no torch), ``process`` the child's loop, ``worker`` the work
itself (also used by the command line in its own process), ``wire`` what passes between them.
"""
