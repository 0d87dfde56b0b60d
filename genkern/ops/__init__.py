"""Ops: functions on tensors, one file each, on every backend."""
