"""Local-affinity refinement: PAR, PAMR and their kin."""
