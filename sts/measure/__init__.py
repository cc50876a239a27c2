"""The paper's definitions and the statistics: arrays in, typed rows out."""
