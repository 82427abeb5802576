"""What happens inside a GPT: pure functions over a loaded model, and one Work around them.

``step`` and ``packed`` need no torch, so that the server's process can use them; what a file needs
of torch it imports inside its functions.
"""
