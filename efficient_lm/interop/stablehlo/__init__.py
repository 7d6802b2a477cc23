"""A model as StableHLO: programs that other software runs, without this package and without flax."""
