"""Training: data, arguments, and the wiring around the Hugging Face Trainer."""
