"""Which arithmetic is cheapest now: functions of tensors and shapes, which know no module and no config."""
