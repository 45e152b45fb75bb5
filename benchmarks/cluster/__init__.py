"""Measurements on a real Kubernetes."""
