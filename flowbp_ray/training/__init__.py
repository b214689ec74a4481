"""Training: adapters or all weights, the learner and its checkpoints, the Ray Train worker around it, publishing, the watch, and
the gradient study.
"""

#: The two files of an exported adapter's folder: the tensors, by the name that diffusers looks for, and what they are.
EXPORT_FILE, NOTE_FILE = "pytorch_lora_weights.safetensors", "adapter.json"
