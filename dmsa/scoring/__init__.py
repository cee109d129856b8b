"""Predictions against labels: protocols, metrics, evaluation, tables."""
