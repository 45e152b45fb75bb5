"""How fast one adapter is trained, beside what KAITO's settings and TRL make of the same machine."""
