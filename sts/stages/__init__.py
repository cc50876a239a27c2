"""What each chapter computes, one file a chapter."""
