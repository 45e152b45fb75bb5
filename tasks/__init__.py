"""The stages of a run as Prefect tasks, one a file; what they do is in the library."""
