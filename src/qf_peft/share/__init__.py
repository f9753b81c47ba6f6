"""Adapters for others: the Hub, cards, ordinary LoRA files."""
