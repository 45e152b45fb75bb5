"""The programs that run in pods, or as processes on this machine; each has one argument, its job file."""
