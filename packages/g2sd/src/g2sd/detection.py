"""Detection with ViTDet: how names of detectron2 and torchvision map onto each other."""

from visionkernels.checkpoints import KeyRules

__all__ = ["rpn_rules"]


def rpn_rules() -> KeyRules:
    """Return the table of detectron2's names of a region proposal head and those of torchvision's `RPNHead`."""
    return KeyRules(
        {
            "conv.conv{i}.{p}": "conv.{i}.0.{p}",
            "objectness_logits.{p}": "cls_logits.{p}",
            "anchor_deltas.{p}": "bbox_pred.{p}",
        }
    )
