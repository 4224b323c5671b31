"""Every knob of a run: sections, names of what can be chosen, reading and checking."""
