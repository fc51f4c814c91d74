"""The pipeline: one block at a time through a model, in memory bounded by one block, never losing finished work."""
