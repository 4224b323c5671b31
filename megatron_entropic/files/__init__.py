"""Files that are whole or not there, and words for the faults of a path."""
