"""What can be tuned, on which GPU sizes, with which settings: files, and the loader that reads them."""
