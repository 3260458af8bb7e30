"""What makes the stand-in tick; nothing here exists in TensorRT-LLM."""
