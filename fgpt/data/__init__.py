"""Token data sets: opening them, and the samples that training reads. See README.md."""
