"""An independent derivation of everything the probe reports: one sequence at a time, plain loops, fp64, no package code."""
