"""Studies on the village, public benchmarks, speed and memory. See README.md here."""
