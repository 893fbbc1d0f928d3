"""Figures: the paper's studies on the village, public benchmarks, speed and memory. See README.md here."""
