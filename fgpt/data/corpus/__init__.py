"""Where text comes from: files and Hugging Face data sets, as documents in a fixed order."""
