"""ONNX → TensorRT engines, with neither torch nor onnx; the runtime builds on arrival, so this stands before it."""
