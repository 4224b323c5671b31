"""Files that are whole or not there, and what is wrong with a path, in words."""
