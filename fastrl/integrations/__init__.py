"""Adapters for other trainers: the only place that patches anything."""
