"""The update: low-rank adapters, their averaged weights, checksums and export."""

#: The two files of an exported adapter's folder: the tensors, by the name that diffusers looks for, and what they are.
EXPORT_FILE, NOTE_FILE = "pytorch_lora_weights.safetensors", "adapter.json"
