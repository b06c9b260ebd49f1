"""The engine: runs the plans of the shared policies on a real GPU."""
