"""ONNX graphs: read safely, asked and changed; nothing here knows a target."""
