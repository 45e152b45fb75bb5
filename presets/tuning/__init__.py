"""The default training config of each method."""
