"""The browser's half: scripts of the pages, a folder a section, and the parts they share."""
