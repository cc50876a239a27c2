"""The paper's definitions and the statistics: arrays in, rows out."""
