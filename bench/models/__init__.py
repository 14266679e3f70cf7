"""Models: presets as data, tokenizers, and how a language model or a scorer is built."""
