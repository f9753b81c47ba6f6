"""Lessons: what must stay, where the stream should go, and the trainer that writes it into the adapter."""
