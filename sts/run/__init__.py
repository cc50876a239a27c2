"""Settings, keys and the store: computed once, found again."""
