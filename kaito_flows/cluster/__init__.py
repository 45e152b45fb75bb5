"""The one gateway to the Kubernetes API, for nodes, platforms and the watcher."""
