"""The program that brings a volume's files into the registry, and an image's files onto a volume."""
