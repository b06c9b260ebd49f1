"""Rival operators, each at its best, behind one calling convention."""
