"""Pure array functions: the hot operations of a language model, without Flax and without parameters.

An operation with several implementations is a folder: `__init__` is its API, `reference` is its definition and reads as
its equation, other files are implementations or what they share, and `cases` are the inputs on which every implementation
must agree. An operation with one implementation is a file, and so is what several operations share: `dispatch`, `mosaic`,
`absmax`, `packing`, `hadamard`.
"""
