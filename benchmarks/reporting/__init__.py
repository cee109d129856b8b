"""From committed results to the pages' tables and plot, and the comparison of two result files."""
