"""Data: readers of sources, one format on disk, one loader."""
