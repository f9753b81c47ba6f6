"""Closed-form solves: tensors in, tensors out, no model in sight."""
