"""The implementations of the rotation: one contract, :class:`dit_rope.rotation_args.RotationArgs`, for all."""
