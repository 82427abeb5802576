"""What the commands of ``python -m gptcore`` share, and one file for each group of them."""
