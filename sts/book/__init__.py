"""How results are shown: chapters, claims, tables, figures."""
