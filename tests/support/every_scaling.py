"""One scaling of every type that comes with the package, for any axis or for the frame axis of a small model."""

from __future__ import annotations

from dit_rope import Scaling


def every_scaling(pairs: int, longer: float = 1.0) -> dict[str, Scaling | tuple[Scaling | None, ...]]:
    """By type, what ``RopeSpec.scaling`` takes for three axes; ``pairs`` of each axis where all have as many.

    Each stretches videos ``longer`` times further than with the default of 1.
    """
    lists = {
        "short_factor": [longer + 0.25 * pair for pair in range(pairs)],
        "long_factor": [2.0 * longer + pair for pair in range(pairs)],
    }
    return {
        "linear": Scaling.of("linear", factor=4.0 * longer),
        "ntk": Scaling.of("ntk", factor=2.0 * longer),
        "fastvideo": Scaling.of("fastvideo", theta_rescale=2.0 * longer, interpolation=0.5),
        "dynamic": Scaling.of("dynamic", factor=2.0 * longer, max_position_embeddings=8, seq_len=24),
        "yarn": Scaling.of("yarn", factor=4.0 * longer, original_max_position_embeddings=64),
        "longrope": Scaling.of(
            "longrope", **lists, factor=4.0 * longer, original_max_position_embeddings=8, seq_len=24
        ),
        "llama3": Scaling.of(
            "llama3",
            factor=8.0 * longer,
            low_freq_factor=1.0,
            high_freq_factor=4.0 * longer,
            original_max_position_embeddings=64,
        ),
        "proportional": Scaling.of("proportional", partial_rotary_factor=0.5 * longer),
        "riflex": (Scaling.of("riflex", frames=90 * longer, k=2), None, None),
        "fps": (
            Scaling.of("fps", fps=16 * longer, factor=1.5),
            Scaling.of("ntk", factor=3.0),
            Scaling.of("ntk", factor=3.0),
        ),
        "kandinsky5": (
            None,
            Scaling.of("kandinsky5", scale=3.16 * longer),
            Scaling.of("kandinsky5", scale=3.16 * longer),
        ),
    }
