"""Policies: who runs next, in which mode, with which adapters."""
