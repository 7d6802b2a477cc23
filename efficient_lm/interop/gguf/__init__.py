"""GGUF files of llama.cpp: read, checked, and taken as checkpoints in the names of Hugging Face."""
