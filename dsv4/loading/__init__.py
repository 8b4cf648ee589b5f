"""From safetensors shards to a model, and back: headers, names, formats, checks, writing."""
