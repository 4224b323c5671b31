"""Every kind of directory that holds weights: read, written, converted, compared."""
