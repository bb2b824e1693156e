"""Elastic models; they know nothing of distribution."""
