"""Rotate queries and keys of your own model: full heads, text tokens that stay, and one rank of a sharded sequence.

python samples/rotate_tensors.py
"""

import torch

import dit_rope
from dit_rope import Grid, RopeSpec, Shard

# Five frames of 6 x 10 tokens, heads of 64 channels: 24 rotate with the frame, 20 with the row, 20 with the column.
spec = RopeSpec(dims=(24, 20, 20))
grid = Grid(5, 6, 10)
table = dit_rope.rope_table(spec, grid)
print(f"{grid.tokens} tokens from {table.rows.nbytes:,} bytes of tables")

batch, heads, text = 2, 4, 7
q, k = torch.randn(2, batch, grid.tokens, heads, 64)
rotated_q, rotated_k = dit_rope.rotate_qk(q, k, table)

# A joint sequence: the text after the video is not rotated.
joint = torch.randn(batch, grid.tokens + text, heads, 64)
rotated = dit_rope.rotate(joint, table, suffix=text)
assert torch.equal(rotated[:, grid.tokens :], joint[:, grid.tokens :])

# Two ranks that hold half of the tokens each get what one that holds all of them gets.
halves = [
    dit_rope.rotate(part.contiguous(), dit_rope.rope_table(spec, grid, shard=Shard(rank=rank, world=2)))
    for rank, part in enumerate(q.chunk(2, dim=1))
]
assert torch.equal(torch.cat(halves, dim=1), rotated_q)

# A stream that goes on: the next 5 frames, by start_frame. Scores between tokens depend on their distance alone.
later = dit_rope.rope_table(spec, Grid(5, 6, 10, start_frame=5))
shifted_q, shifted_k = dit_rope.rotate_qk(q, k, later)
now = torch.einsum("bqhd,bkhd->bhqk", rotated_q, rotated_k)
then = torch.einsum("bqhd,bkhd->bhqk", shifted_q, shifted_k)
print(f"largest change of a score when all frames move by 5: {(now - then).abs().max():.2g}")
