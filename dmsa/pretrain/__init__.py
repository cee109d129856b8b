"""Backbones without labels: by formula or by self-distillation (`dmsa pretrain`)."""
