"""Task files for lm-evaluation-harness (`--include_path sts/tasks`), which read the same data as the book."""
