"""A run read back from its directory, and the pages and figures made of it."""
