"""What stages of several pillars share: calibration, Hessians, solver, rules, coupled dimensions, search."""
