"""Published names and ours, safetensors in and out, resumable training snapshots."""
