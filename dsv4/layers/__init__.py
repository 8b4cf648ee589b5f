"""The layers: each holds its weights and calls operations. One class per file."""
