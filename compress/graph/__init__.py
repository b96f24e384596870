"""ONNX graphs: read safely, queried and edited; nothing here knows a target."""
