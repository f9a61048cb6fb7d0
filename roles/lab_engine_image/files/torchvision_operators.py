# Lab: appended to torchvision/extension.py. Its own operators cannot be loaded beside a CPU build of
# torch, and the rest of torchvision only needs two of them to be declared.
import torch

if not hasattr(torch.ops.torchvision, "nms"):
    _lab_operators = torch.library.Library("torchvision", "DEF")
    for _name in ("nms", "qnms"):
        _lab_operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
