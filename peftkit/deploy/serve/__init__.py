"""An OpenAI-compatible endpoint on an existing engine: transformers' continuous batching here, vLLM on a GPU."""
