"""Export of adapted models for ONNX and for torch.export, checked against the predictions of `eval`."""
