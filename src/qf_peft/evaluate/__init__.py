"""What a model says, and what lessons did to it."""
