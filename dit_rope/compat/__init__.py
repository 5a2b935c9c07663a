"""The call signatures of other libraries over dit_rope's tables and rotations."""
