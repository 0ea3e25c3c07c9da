"""Sample number -> tokens: a pure function of (seed, number), no state and no index to build."""
