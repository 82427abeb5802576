"""The process that owns a device: one piece of work at a time, or several texts of one variant.

``client`` is the server's side (no torch), ``process`` the child's loop, ``worker`` the work
itself (also used by the command line in its own process), ``sitting`` the texts that are written
side by side, ``wire`` what passes between them.
"""
