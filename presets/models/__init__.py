"""The models that can be tuned, a file each."""
