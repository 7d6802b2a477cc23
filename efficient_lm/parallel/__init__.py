"""Parallelism: the mesh a config asks for, and the one layer that moves tokens between devices by hand."""
