"""``python -m gptcore.host``: started by the server, one a device."""

from gptcore.host.process import main

main()
