"""Adapters to other people's frameworks: one file each, imported only by those who have that framework."""
