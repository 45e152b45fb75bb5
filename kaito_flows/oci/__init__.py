"""OCI images without a daemon: references, layouts on disk, and images made of plain files."""
