"""The streamed merge's parts: tensors from disk, adapter files and the proof."""
