"""What `make test` leaves to `make test-long`: further cases of tests that have many, in other shapes and combinations.

Continuous integration has 35 minutes on two cores. Of a test that is marked `thinned` the first and every sixth case after
it are run there; which these are depends on nothing but their order.
"""
KEPT = 6


def split(items: list) -> tuple[list, list]:
  """Those of pytest's items that `make test` runs, and those that it leaves to `make test-long`."""
  run, left, seen = [], [], {}
  for item in items:
    name = item.nodeid.split('[')[0]
    seen[name] = seen.get(name, -1) + 1
    (left if item.get_closest_marker('thinned') and seen[name] % KEPT else run).append(item)
  return run, left
