"""What the watcher knows and does: what a Workspace asks for, its runs in Prefect, what its status says."""
