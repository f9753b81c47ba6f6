"""The parts of `compare.py`: data, methods, scores, and a run that can be broken off and goes on."""
