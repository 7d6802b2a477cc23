"""Pure array functions: the hot operations of a language model, without Flax and without parameters.

An operation with several implementations is a folder: `__init__` is its API, `reference` is its definition and reads as
its equation, each other file is one implementation, and `cases` are the inputs on which every implementation must agree.
An operation with one implementation is a file.
"""
